//! Images and their labels in LeCun's idx format, as MNIST and its like are published.
//!
//! A file is a magic number, sizes and bytes: `00 00 08 03`, then count, rows and columns as big-endian `u32`, then the
//! pixels, row after row, image after image; labels are `00 00 08 01`, their count, and a byte each. `08` says that the
//! data are unsigned bytes and the last byte how many sizes follow; nothing else is read here.
//!
//! The labels lie beside the images, under the same name: `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, also
//! with a dot before `idx`. A pixel is a column, `pixel000` and on in reading order, and the label is `label`. All columns
//! look into one buffer, in which bytes stay bytes until rows are encoded.

use std::fs::{self, File, Metadata};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::DataError;
use crate::records::{COLUMNS_MAX, read_error};

/// What files of images and of labels begin with.
const IMAGES_MAGIC: u32 = 0x0803;
const LABELS_MAGIC: u32 = 0x0801;

/// The column of the labels.
const LABEL: &str = "label";

/// What is wrong with files in idx format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdxFault {
    /// Compressed, as such files are published.
    #[error("is compressed; unpack it with gunzip")]
    Compressed,
    /// Another kind of file.
    #[error("begins with {got:#010x}, expected {expected:#010x}, {what} in idx format as bytes")]
    Magic {
        /// The first four bytes.
        got: u32,
        /// What they should be.
        expected: u32,
        /// What was looked for.
        what: &'static str,
    },
    /// Ends before its sizes do.
    #[error("has {got} bytes, expected a header of {expected}; copy it anew")]
    Header {
        /// How many there are.
        got: u64,
        /// How many there should be at least.
        expected: u64,
    },
    /// Shorter or longer than its sizes say.
    #[error("has {got} bytes, expected {expected} for {sizes} as its header says; copy it anew")]
    Length {
        /// How many there are.
        got: u64,
        /// How many there should be.
        expected: u128,
        /// The sizes in the header.
        sizes: String,
    },
    /// No image.
    #[error("has no image, expected at least one")]
    NoImage,
    /// Images without pixels, or larger than a table may be wide.
    #[error("images of {rows} x {columns} pixels, expected between 1 and {max} pixels; scale them down", max = COLUMNS_MAX - 1)]
    Pixels {
        /// How many rows.
        rows: u32,
        /// How many columns.
        columns: u32,
    },
    /// A name that does not say where the labels are.
    #[error(
        "its labels cannot be found: expected a name like train-images-idx3-ubyte, for train-labels-idx1-ubyte beside it"
    )]
    Name,
    /// No labels beside the images.
    #[error("its labels are missing: expected {expected} beside it")]
    NoLabels {
        /// The labels' name.
        expected: String,
    },
    /// Labels of other images.
    #[error("has {images} images, and {labels_file} has {labels} labels; they belong to different data")]
    Counts {
        /// How many images.
        images: u32,
        /// How many labels.
        labels: u32,
        /// The labels' name.
        labels_file: String,
    },
}

/// The files that are read for `path`: itself, or images and labels, also of a directory that holds them.
///
/// Where files are missing, those are named that are there, or `path` alone.
#[must_use]
pub fn data_files(path: &Path) -> Vec<PathBuf> {
    let Some(images) = images_of(path) else { return vec![path.to_owned()] };
    let labels = labels_of(&images).into_iter().find(|labels| labels.exists());
    [images].into_iter().chain(labels).collect()
}

/// The file of images that `path` is or, if it is a directory, holds: the one for training, where there are several.
pub(crate) fn images_of(path: &Path) -> Option<PathBuf> {
    if !path.is_dir() {
        return is_idx(path).then(|| path.to_owned());
    }
    let there = fs::read_dir(path).ok()?.flatten().map(|entry| entry.path());
    let mut images: Vec<PathBuf> = there.filter(|path| is_images_name(path) && path.is_file()).collect();
    images.sort_by_key(|path| (!named(path).starts_with("train"), path.clone()));
    images.into_iter().next()
}

/// Whether it is to be read as images, be it for its name or because it begins with zeros, as no text does.
fn is_idx(path: &Path) -> bool {
    let begins = || {
        let mut first = [1; 2];
        File::open(path).and_then(|mut file| file.read_exact(&mut first)).map(|()| first == [0, 0])
    };
    path.is_file() && (is_images_name(path) || begins().unwrap_or(false))
}

fn is_images_name(path: &Path) -> bool {
    let name = named(path);
    name.contains("images") && name.ends_with("idx3-ubyte")
}

fn named(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Where the labels of `images` may be: the same name, and the same with the other of dash and dot.
fn labels_of(images: &Path) -> Vec<PathBuf> {
    let name = named(images);
    let Some((before, after)) = name.rsplit_once("images") else { return Vec::new() };
    let after = after.replace("idx3", "idx1");
    let other = match after.strip_prefix('.') {
        Some(rest) => format!("-{rest}"),
        None => after.replacen('-', ".", 1),
    };
    [after, other].into_iter().map(|after| images.with_file_name(format!("{before}labels{after}"))).collect()
}

/// Images and their labels, as columns see them.
pub(crate) struct Images {
    pub(crate) count: usize,
    pub(crate) pixels: Pixels,
    pub(crate) labels: Pixels,
}

/// Bytes in records of `width`.
#[derive(Clone, Debug)]
pub(crate) struct Pixels {
    pub(crate) bytes: Arc<[u8]>,
    pub(crate) width: usize,
}

impl Images {
    /// Reads the file at `path` and the labels beside it.
    pub(crate) fn read(path: &Path) -> Result<Self, DataError> {
        let fault = |fault| DataError::Idx { path: path.display().to_string(), fault: Box::new(fault) };
        let candidates = labels_of(path);
        let expected = candidates.first().ok_or_else(|| fault(IdxFault::Name))?;
        let ([count, rows, columns], pixels) = read(path, IMAGES_MAGIC, "images", check_images)?;
        let missing = || fault(IdxFault::NoLabels { expected: named(expected) });
        let labels_path = candidates.iter().find(|path| path.exists()).ok_or_else(missing)?;
        let ([labels], bytes) = read(labels_path, LABELS_MAGIC, "labels", |_| Ok(()))?;
        if labels != count {
            return Err(fault(IdxFault::Counts { images: count, labels, labels_file: named(labels_path) }));
        }
        // No more than there are bytes in memory.
        let (count, width) = (count as usize, rows as usize * columns as usize);
        Ok(Self { count, pixels: Pixels { bytes: pixels, width }, labels: Pixels { bytes, width: 1 } })
    }

    /// The names of the columns: pixels in reading order, then the label.
    pub(crate) fn names(&self) -> impl Iterator<Item = String> + use<> {
        let width = self.pixels.width;
        let digits = (width - 1).to_string().len().max(3);
        (0..width).map(move |at| format!("pixel{at:0digits$}")).chain([LABEL.to_owned()])
    }
}

fn check_images(&[count, rows, columns]: &[u32; 3]) -> Result<(), IdxFault> {
    let pixels = u64::from(rows) * u64::from(columns);
    match (count, pixels) {
        (0, _) => Err(IdxFault::NoImage),
        (_, pixels) if (1..COLUMNS_MAX as u64).contains(&pixels) => Ok(()),
        _ => Err(IdxFault::Pixels { rows, columns }),
    }
}

/// Reads one file whole: its sizes, which `check` has passed, and its bytes.
fn read<const SIZES: usize>(
    path: &Path,
    magic: u32,
    what: &'static str,
    check: impl FnOnce(&[u32; SIZES]) -> Result<(), IdxFault>,
) -> Result<([u32; SIZES], Arc<[u8]>), DataError> {
    let shown = path.display().to_string();
    let failed = |source| read_error(&shown, source);
    let fault = |fault| DataError::Idx { path: shown.clone(), fault: Box::new(fault) };
    let mut file = File::open(path).map_err(failed)?;
    let opened = file.metadata().map_err(failed)?;
    let (got, header) = (opened.len(), 4 + 4 * SIZES as u64);
    let first = word(&mut file, got).map_err(failed)?;
    if first >> 16 == 0x1f8b {
        return Err(fault(IdxFault::Compressed));
    }
    if first != magic && got >= 4 {
        return Err(fault(IdxFault::Magic { got: first, expected: magic, what }));
    }
    if got < header {
        return Err(fault(IdxFault::Header { got, expected: header }));
    }
    let mut sizes = [0; SIZES];
    for size in &mut sizes {
        *size = word(&mut file, got).map_err(failed)?;
    }
    check(&sizes).map_err(fault)?;
    let bytes = sizes.iter().map(|&size| u128::from(size)).product::<u128>();
    let expected = bytes + u128::from(header);
    // Before a byte of memory is asked for.
    if u128::from(got) != expected {
        let sizes = sizes.map(|size| size.to_string()).join(" x ");
        return Err(fault(IdxFault::Length { got, expected, sizes }));
    }
    let bytes = usize::try_from(bytes).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
    let mut data = vec![0; bytes];
    file.read_exact(&mut data).map_err(failed)?;
    check_unchanged(&file, &opened).map_err(failed)?;
    Ok((sizes, data.into()))
}

/// The next four bytes; zero where the file is too short for any.
fn word(file: &mut File, length: u64) -> io::Result<u32> {
    let mut bytes = [0; 4];
    if length >= 4 {
        file.read_exact(&mut bytes)?;
    }
    Ok(u32::from_be_bytes(bytes))
}

/// A file that somebody writes to meanwhile ends too early, as far as we are concerned.
fn check_unchanged(file: &File, opened: &Metadata) -> io::Result<()> {
    let now = file.metadata()?;
    let same = now.len() == opened.len() && now.modified().ok() == opened.modified().ok();
    if same { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
