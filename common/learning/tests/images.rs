//! From images in idx format to encoded rows: what is accepted, what is refused and with which sentence.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use learning::{Dataset, Encoding, Table, data_files, merge};
use protocol::plan::DataSpec;
use tempfile::TempDir;

use tributary_learning as learning;

/// Four images of 2 x 3 pixels, in which the last pixel is never set, and their labels.
const PIXELS: [[u8; 6]; 4] =
    [[0, 51, 255, 1, 0, 0], [0, 0, 128, 2, 0, 0], [0, 255, 0, 3, 255, 0], [255, 0, 0, 4, 0, 0]];
const LABELS: [u8; 4] = [7, 0, 7, 3];

fn idx(magic: [u8; 4], sizes: &[u32], bytes: &[u8]) -> Vec<u8> {
    let sizes = sizes.iter().flat_map(|size| size.to_be_bytes());
    magic.into_iter().chain(sizes).chain(bytes.iter().copied()).collect()
}

fn images(count: u32, rows: u32, columns: u32, bytes: &[u8]) -> Vec<u8> {
    idx([0, 0, 8, 3], &[count, rows, columns], bytes)
}

fn labels(bytes: &[u8]) -> Vec<u8> {
    idx([0, 0, 8, 1], &[u32::try_from(bytes.len()).unwrap()], bytes)
}

/// A directory with images and labels.
struct Home {
    dir: TempDir,
}

impl Home {
    fn new() -> Self {
        let home = Self { dir: TempDir::new().unwrap() };
        home.write("train-images-idx3-ubyte", &images(4, 2, 3, PIXELS.as_flattened()));
        home.write("train-labels-idx1-ubyte", &labels(&LABELS));
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// The sentence that `name` is refused with, without the directory.
    fn refusal(&self, name: &str) -> String {
        let refused = Table::read(&self.path(name)).unwrap_err().to_string();
        refused.replace(&format!("{}/", self.dir.path().display()), "")
    }

    /// The same, with `bytes` in the place of the images.
    fn refusal_of(&self, bytes: &[u8]) -> String {
        self.write("train-images-idx3-ubyte", bytes);
        self.refusal("train-images-idx3-ubyte")
    }
}

fn spec() -> DataSpec {
    DataSpec { validation_fraction: 0.0, ..DataSpec::default() }
}

#[test]
fn a_pixel_becomes_its_share_of_white_whatever_the_other_images_are() {
    let home = Home::new();
    let table = Table::read(&home.path("train-images-idx3-ubyte")).unwrap();
    assert_eq!(table.column_names().collect::<Vec<_>>().join(" "), {
        "pixel000 pixel001 pixel002 pixel003 pixel004 pixel005 label"
    });
    let mut data = Dataset::new(table, &spec(), None, 7, "a").unwrap();
    let survey = data.survey(5).unwrap();
    let schema = merge(&BTreeMap::from([("a".to_owned(), survey.clone()), ("b".to_owned(), survey)]), &spec());
    let schema = schema.unwrap().schema;
    assert_eq!(schema.classes().unwrap(), ["0", "3", "7"]);
    let scale = Encoding::Numeric { mean: 0.0, deviation: 255.0, missing: false };
    assert!(schema.columns.iter().all(|column| column.encoding == scale));
    let rows = data.encode(&schema).unwrap().training;
    for (at, pixels) in PIXELS.iter().enumerate() {
        assert_eq!(rows.features(at), pixels.map(|pixel| f32::from(pixel) / 255.0));
    }
    assert_eq!(rows.targets(), [2.0, 0.0, 2.0, 1.0]);
}

#[test]
fn nothing_of_the_pixels_is_in_the_survey() {
    let survey = |pixel: u8| {
        let home = Home::new();
        home.write("train-images-idx3-ubyte", &images(4, 2, 3, &[pixel; 24]));
        let table = Table::read(&home.path("train-images-idx3-ubyte")).unwrap();
        Dataset::new(table, &spec(), None, 7, "a").unwrap().survey(1).unwrap().to_bytes()
    };
    assert_eq!(survey(0), survey(200));
}

#[test]
fn labels_are_found_beside_the_images_with_dash_and_with_dot() {
    let home = Home::new();
    home.write("t10k-images.idx3-ubyte", &images(2, 2, 3, &[9; 12]));
    assert_eq!(
        home.refusal("t10k-images.idx3-ubyte"),
        "t10k-images.idx3-ubyte: its labels are missing: expected t10k-labels.idx1-ubyte beside it"
    );
    for name in ["t10k-labels.idx1-ubyte", "t10k-labels-idx1-ubyte"] {
        home.write(name, &labels(&[1, 2]));
        let images = home.path("t10k-images.idx3-ubyte");
        assert_eq!(Table::read(&images).unwrap().rows(), 2);
        assert_eq!(data_files(&images), [images.clone(), home.path(name)]);
        fs::remove_file(home.path(name)).unwrap();
    }
}

#[test]
fn a_directory_is_its_images_for_training() {
    let home = Home::new();
    home.write("t10k-images-idx3-ubyte", &images(2, 2, 3, &[9; 12]));
    home.write("t10k-labels-idx1-ubyte", &labels(&[1, 2]));
    assert_eq!(Table::read(home.dir.path()).unwrap().rows(), 4);
    let files = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"];
    assert_eq!(data_files(home.dir.path()), files.map(|name| home.path(name)));
    let csv = home.path("shard.csv");
    assert_eq!(data_files(&csv), [home.path("shard.csv")]);
}

#[test]
fn files_that_are_not_what_their_names_say_are_refused_with_what_was_got_and_expected() {
    let home = Home::new();
    let magic = "train-images-idx3-ubyte: begins with 0x00000801, expected 0x00000803, images in idx format as bytes";
    assert_eq!(home.refusal_of(&labels(&LABELS)), magic);
    let gzip = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0];
    assert_eq!(home.refusal_of(&gzip), "train-images-idx3-ubyte: is compressed; unpack it with gunzip");
    let csv = home.refusal_of(b"pixel,label\n1,2\n");
    assert!(csv.contains("begins with 0x70697865, expected 0x00000803"), "{csv}");
    home.write("train-images-idx3-ubyte", &images(4, 2, 3, PIXELS.as_flattened()));
    home.write("train-labels-idx1-ubyte", &images(4, 2, 3, PIXELS.as_flattened()));
    let labels = "train-labels-idx1-ubyte: begins with 0x00000803, expected 0x00000801, labels in idx format as bytes";
    assert_eq!(home.refusal("train-images-idx3-ubyte"), labels);
}

#[test]
fn a_truncated_file_is_refused_before_memory_is_asked_for() {
    let home = Home::new();
    let whole = images(4, 2, 3, PIXELS.as_flattened());
    let short = |got| {
        let expected = "expected 40 for 4 x 2 x 3 as its header says; copy it anew";
        format!("train-images-idx3-ubyte: has {got} bytes, {expected}")
    };
    assert_eq!(home.refusal_of(&whole[..39]), short(39));
    assert_eq!(home.refusal_of(&[whole.clone(), vec![0]].concat()), short(41));
    for length in [0, 3, 4, 15] {
        let header = format!("train-images-idx3-ubyte: has {length} bytes, expected a header of 16; copy it anew");
        assert_eq!(home.refusal_of(&whole[..length]), header);
    }
    let vast = home.refusal_of(&images(u32::MAX, 1, 1, &[]));
    assert!(vast.contains("has 16 bytes, expected 4294967311 for 4294967295 x 1 x 1"), "{vast}");
}

#[test]
fn sizes_that_make_no_table_are_refused() {
    let home = Home::new();
    assert_eq!(home.refusal_of(&images(0, 2, 3, &[])), "train-images-idx3-ubyte: has no image, expected at least one");
    for (rows, columns) in [(0, 3), (256, 256), (u32::MAX, u32::MAX)] {
        let refused = home.refusal_of(&images(1, rows, columns, &[]));
        let expected = "expected between 1 and 65535 pixels; scale them down";
        assert_eq!(refused, format!("train-images-idx3-ubyte: images of {rows} x {columns} pixels, {expected}"));
    }
}

#[test]
fn labels_of_other_images_are_refused() {
    let home = Home::new();
    home.write("train-labels-idx1-ubyte", &labels(&[1, 2, 3]));
    assert_eq!(
        home.refusal("train-images-idx3-ubyte"),
        "train-images-idx3-ubyte: has 4 images, and train-labels-idx1-ubyte has 3 labels; they belong to different data"
    );
}

#[test]
fn a_name_that_does_not_say_where_the_labels_are_is_refused() {
    let home = Home::new();
    home.write("digits", &images(4, 2, 3, PIXELS.as_flattened()));
    assert_eq!(
        home.refusal("digits"),
        "digits: its labels cannot be found: expected a name like train-images-idx3-ubyte, for train-labels-idx1-ubyte \
         beside it"
    );
}
