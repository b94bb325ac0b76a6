//! The models, and their reference: gradients by candle's autograd.
//!
//! Every model here is a chain of dense layers, `x · Wᵀ + b`, with ReLU between them: `linear` is the chain of one. With
//! classes the last layer has one output for each, two classes too, and the loss is softmax cross-entropy in nats; with
//! a number it has one, and the loss is the squared error of the standardised target. Weights come and go as one slice
//! in layout order. What trains them is the `Stepper`, which is faster and is held against autograd by a test.

use candle_core::{Device, Result as CandleResult, Tensor, Var};
use protocol::draw::Draw;
use protocol::layout::{Layout, LayoutError, TensorSpec};
use protocol::plan::ModelSpec;

use crate::encoding::Rows;
use crate::schema::Schema;
use crate::stepper::Stepper;
use crate::training::Gradient;

/// A model without its weights.
#[derive(Clone, Debug)]
pub struct Network {
    layers: Vec<Layer>,
    layout: Layout,
    classes: bool,
    /// Whether training starts from zero: right for a convex loss, and for nothing else.
    from_zero: bool,
    /// How many threads may share a step.
    pub(crate) threads: usize,
}

/// The shape of one layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layer {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

impl Network {
    /// The network that `spec` asks for, between the inputs and outputs of `schema`.
    ///
    /// # Errors
    /// If it would be larger than a model may be.
    pub fn new(spec: &ModelSpec, schema: &Schema) -> Result<Self, LayoutError> {
        let hidden = match spec {
            ModelSpec::Linear => &[][..],
            ModelSpec::Mlp { hidden } => hidden,
        };
        let mut inputs = schema.inputs();
        let mut layers = Vec::with_capacity(hidden.len() + 1);
        for outputs in hidden.iter().map(|&width| width as usize).chain([schema.outputs()]) {
            layers.push(Layer { inputs, outputs });
            inputs = outputs;
        }
        let layout = Layout::new(layers.iter().enumerate().flat_map(|(at, layer)| layer.tensors(at)).collect())?;
        let from_zero = matches!(spec, ModelSpec::Linear);
        Ok(Self { layers, layout, classes: schema.classes().is_some(), from_zero, threads: 1 })
    }

    /// The same network, whose training may take up to `threads` threads. It takes more than one only where a step has
    /// enough work to share, and gives the same bits whatever their number.
    #[must_use]
    pub fn with_threads(self, threads: usize) -> Self {
        Self { threads: threads.max(1), ..self }
    }

    /// Names and shapes of the weights, and their order.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The weights before round 1: zero for `linear`; else uniform within ±√(6 / inputs) for a layer under ReLU
    /// (He et al. 2015, formula 10) and ±√(1 / inputs) for the last one, biases zero.
    #[must_use]
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let mut weights = Vec::new();
        for (at, layer) in self.layers.iter().enumerate() {
            let [_, weight] = layer.tensors(at);
            let mut draw = Draw::new(seed, "initial weights", 0, &weight.name);
            let gain = if at + 1 == self.layers.len() { 1.0 } else { 6.0 };
            let bound = if self.from_zero { 0.0 } else { (gain / to_f64(layer.inputs)).sqrt() };
            weights.resize(weights.len() + layer.outputs, 0.0);
            #[allow(clippy::cast_possible_truncation)] // a number around 1 rounds to the nearest f32
            weights.extend((0..layer.inputs * layer.outputs).map(|_| ((2.0 * draw.uniform() - 1.0) * bound) as f32));
        }
        weights
    }

    /// How many inputs a row has.
    fn inputs(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.inputs)
    }

    /// What takes rows through this network with `weights`, at most `rows` in a batch, by up to `threads` threads; `gather` if
    /// more is asked of it than outputs and single steps of plain descent.
    pub(crate) fn stepper(&self, weights: &[f32], rows: usize, gather: bool, threads: usize) -> Stepper {
        Stepper::new(&self.layers, self.classes, weights, rows, gather, threads)
    }

    /// The mean gradient over the `picked` rows, by candle's autograd: what training is held against, and some ten times
    /// slower.
    ///
    /// # Panics
    /// If `weights` or `rows` are of another layout or schema.
    #[must_use]
    pub fn gradient_by_autograd(&self, weights: &[f32], rows: &Rows, picked: &[usize]) -> Gradient {
        let (values, loss) = self.differentiate(weights, rows, picked).expect(SHAPES);
        Gradient { values: values.into(), loss }
    }

    fn differentiate(&self, weights: &[f32], rows: &Rows, picked: &[usize]) -> CandleResult<(Vec<f32>, f64)> {
        let parameters = self.tensors(weights)?.iter().map(Var::from_tensor).collect::<CandleResult<Vec<_>>>()?;
        let tensors: Vec<Tensor> = parameters.iter().map(|variable| variable.as_tensor().clone()).collect();
        let outputs = self.forward(&tensors, &inputs(rows, picked, self.inputs())?)?;
        let loss = self.loss(&outputs, rows, picked)?;
        let store = loss.backward()?;
        let mut gradient = Vec::with_capacity(weights.len());
        for tensor in &tensors {
            match store.get(tensor) {
                Some(of_tensor) => gradient.extend(of_tensor.flatten_all()?.to_vec1::<f32>()?),
                None => gradient.resize(gradient.len() + tensor.elem_count(), 0.0),
            }
        }
        Ok((gradient, f64::from(loss.to_scalar::<f32>()?)))
    }

    /// The weights as tensors: bias and weight of each layer in turn, which is layout order.
    fn tensors(&self, weights: &[f32]) -> CandleResult<Vec<Tensor>> {
        let mut rest = weights;
        let mut tensors = Vec::with_capacity(2 * self.layers.len());
        for Layer { inputs, outputs } in &self.layers {
            let (bias, behind) = rest.split_at(*outputs);
            let (weight, behind) = behind.split_at(inputs * outputs);
            tensors.push(Tensor::from_slice(bias, *outputs, &Device::Cpu)?);
            tensors.push(Tensor::from_slice(weight, (*outputs, *inputs), &Device::Cpu)?);
            rest = behind;
        }
        assert!(rest.is_empty(), "{} weights too many for the layout", rest.len());
        Ok(tensors)
    }

    fn forward(&self, parameters: &[Tensor], inputs: &Tensor) -> CandleResult<Tensor> {
        let mut x = inputs.clone();
        for (at, layer) in parameters.chunks_exact(2).enumerate() {
            x = x.matmul(&layer[1].t()?)?.broadcast_add(&layer[0])?;
            if at + 1 < self.layers.len() {
                x = x.relu()?;
            }
        }
        Ok(x)
    }

    fn loss(&self, outputs: &Tensor, rows: &Rows, picked: &[usize]) -> CandleResult<Tensor> {
        let targets = picked.iter().map(|&row| rows.targets()[row]);
        if !self.classes {
            let targets = Tensor::from_vec(targets.collect(), (picked.len(), 1), &Device::Cpu)?;
            return (outputs - targets)?.sqr()?.mean_all();
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // the number of a class
        let classes = targets.map(|target| target as u32).collect();
        let classes = Tensor::from_vec(classes, (picked.len(), 1), &Device::Cpu)?;
        // log Σ exp(z) = m + log Σ exp(z - m); the m of one row is a constant that cancels.
        let shifted = outputs.broadcast_sub(&outputs.max_keepdim(1)?.detach())?;
        let log_sums = shifted.exp()?.sum_keepdim(1)?.log()?;
        (log_sums - shifted.gather(&classes, 1)?)?.mean_all()
    }
}

const SHAPES: &str = "every shape follows from the layout and the schema";

impl Layer {
    /// How many weights it has, the bias among them.
    pub(crate) fn weights(self) -> usize {
        self.outputs * (self.inputs + 1)
    }

    fn tensors(&self, at: usize) -> [TensorSpec; 2] {
        let width = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let (inputs, outputs) = (width(self.inputs), width(self.outputs));
        // Two digits, so that the order of names is the order of layers: a plan has at most 17.
        [
            TensorSpec { name: format!("layer{at:02}.bias"), shape: vec![outputs] },
            TensorSpec { name: format!("layer{at:02}.weight"), shape: vec![outputs, inputs] },
        ]
    }
}

fn inputs(rows: &Rows, picked: &[usize], width: usize) -> CandleResult<Tensor> {
    let mut values = vec![0.0; picked.len() * width];
    values.chunks_exact_mut(width).zip(picked).for_each(|(inputs, &row)| rows.write_features(row, inputs));
    Tensor::from_vec(values, (picked.len(), width), &Device::Cpu)
}

#[allow(clippy::cast_precision_loss)] // widths and counts of rows stay far below 2^53
pub(crate) fn to_f64(count: usize) -> f64 {
    count as f64
}
