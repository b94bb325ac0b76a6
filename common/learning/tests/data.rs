//! From a CSV file to encoded rows: what is accepted, what is refused and with which sentence, what the fleet shares.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fs;

use learning::{DataError, Dataset, DropReason, Encoding, MergeError, Note, Schema, Survey, Table, Target, merge};
use protocol::plan::{DataSpec, LearningTask};
use tempfile::TempDir;

use tributary_learning as learning;

/// A directory of data files, one for each worker.
struct Shards {
    dir: TempDir,
    spec: DataSpec,
}

impl Shards {
    fn new() -> Self {
        Self { dir: TempDir::new().unwrap(), spec: DataSpec { validation_fraction: 0.0, ..DataSpec::default() } }
    }

    fn with(change: impl FnOnce(&mut DataSpec)) -> Self {
        let mut shards = Self::new();
        change(&mut shards.spec);
        shards
    }

    fn read(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<Table, DataError> {
        let path = self.dir.path().join(format!("{name}.csv"));
        fs::write(&path, bytes).unwrap();
        Table::read(&path)
    }

    fn dataset(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<Dataset, DataError> {
        Dataset::new(self.read(name, bytes)?, &self.spec, None, 7, name)
    }

    fn survey(&self, name: &str, bytes: impl AsRef<[u8]>) -> Survey {
        let survey = self.dataset(name, bytes).unwrap().survey(2).unwrap();
        assert_eq!(Survey::from_bytes(&survey.to_bytes()).unwrap(), survey);
        survey
    }

    fn merge(&self, files: &[(&str, &str)]) -> Result<learning::Frozen, MergeError> {
        let surveys = files.iter().map(|(name, text)| ((*name).to_owned(), self.survey(name, text)));
        merge(&surveys.collect(), &self.spec)
    }

    fn schema(&self, files: &[(&str, &str)]) -> Schema {
        let schema = self.merge(files).unwrap().schema;
        assert_eq!(Schema::from_bytes(&schema.to_bytes()).unwrap(), schema);
        schema
    }

    /// The sentence that `bytes` are refused with, without the directory.
    fn refusal(&self, bytes: impl AsRef<[u8]>) -> String {
        let error = self.dataset("f", bytes).unwrap_err();
        self.shown(&error)
    }

    fn shown(&self, error: &DataError) -> String {
        let dir = format!("{}/", self.dir.path().display());
        error.to_string().replace(&dir, "")
    }
}

fn classes(schema: &Schema) -> Vec<&str> {
    schema.classes().unwrap().iter().map(String::as_str).collect()
}

fn encoding<'a>(schema: &'a Schema, name: &str) -> &'a Encoding {
    &schema.columns.iter().find(|column| column.name == name).unwrap().encoding
}

fn vocabulary<'a>(schema: &'a Schema, name: &str) -> Vec<&'a str> {
    match encoding(schema, name) {
        Encoding::Categorical { vocabulary } => vocabulary.iter().map(String::as_str).collect(),
        other @ Encoding::Numeric { .. } => panic!("{other:?}"),
    }
}

#[test]
fn a_file_that_is_no_table_is_refused_with_place_and_remedy() {
    let shards = Shards::new();
    let missing = Table::read(&shards.dir.path().join("none.csv")).unwrap_err();
    assert_eq!(shards.shown(&missing), "none.csv: no such file");
    fs::create_dir(shards.dir.path().join("d")).unwrap();
    let directory = Table::read(&shards.dir.path().join("d")).unwrap_err();
    assert_eq!(shards.shown(&directory), "d: not a file; name one CSV file, or images in idx format");
    for empty in ["", "\n\n", "\r\n"] {
        assert_eq!(shards.refusal(empty), "f.csv: is empty, expected a header line and at least one row", "{empty:?}");
    }
    assert_eq!(shards.refusal("a,b\n"), "f.csv: has a header and no rows, expected at least one");
    assert_eq!(
        shards.refusal("1,2.5,0\n3,4,1\n"),
        "f.csv:1: the first line is all numbers (1, 2.5, 0), expected the names of the columns; add a header line"
    );
    assert_eq!(shards.refusal("a,b,a\n1,2,3\n"), "f.csv:1: columns 1 and 3 are both called \"a\"; rename one");
    assert_eq!(shards.refusal("a,,b\n1,2,3\n"), "f.csv:1: column 2 has no name; give it one");
}

#[test]
fn a_broken_row_is_refused_with_its_line() {
    let shards = Shards::new();
    let ragged = "cells, the header has 2; put cells that hold a comma between quotes";
    assert_eq!(shards.refusal("a,y\n1,2\n\n3,4,5\n6,7\n"), format!("f.csv:4: 3 {ragged}"));
    assert_eq!(shards.refusal("a,y\r\n1,2\r\n3\r\n"), format!("f.csv:3: 1 {ragged}"));
    assert_eq!(shards.refusal("a,y\n\"x\ny\",2\n3"), format!("f.csv:4: 1 {ragged}"));
    let open = |line| {
        format!(
            "f.csv:{line}: a quote that opens in this row is never closed; close it, or write a quote that is part of a \
             cell twice"
        )
    };
    assert_eq!(shards.refusal("a,y\n1,2\n3,\"4\n5,6\n7,8\n"), open(3));
    assert_eq!(shards.refusal("a,y\r\n1,2\r\n\"3,4\r\n5,6\r\n7,8"), open(3));
    assert_eq!(shards.refusal("\u{feff}a,y\n1,2\n3,\"4 \"\" 5\n"), open(3));
    assert_eq!(shards.refusal("a,\"y\n1,2\n"), open(1));
    assert_eq!(shards.refusal(b"a,y\n1,2\n3,\xe9t\xe9\n"), "f.csv:3: not UTF-8; save the file as UTF-8");
}

#[test]
fn a_byte_order_mark_crlf_quotes_and_blank_lines_are_fine() {
    let shards = Shards::new();
    let plain = shards.dataset("w", "a,y\n1,p\n2,q\n3,p\n").unwrap().survey(1).unwrap();
    for same in [
        "\u{feff}a,y\n1,p\n2,q\n3,p\n",
        "a,y\r\n1,p\r\n2,q\r\n3,p",
        "\u{feff}\"a\",\"y\"\r\n\r\n\"1\",\"p\"\r\n2,q\r\n\r\n3,p\r\n\r\n",
        " a , y \n 1 , p \n+2.0,q\n3e0,p\n",
    ] {
        assert_eq!(shards.dataset("w", same).unwrap().survey(1).unwrap(), plain, "{same:?}");
    }
}

#[test]
fn a_stray_word_among_numbers_is_refused_unless_the_column_is_called_categorical() {
    let text = "bmi,y\n20.5,0\n21,1\n22,0\nn/a?,1\n23,0\n";
    let sentence = "f.csv:5: column \"bmi\": \"n/a?\" is not a number; correct the cell, leave it empty if the value is \
                    missing, or list the column under data.categorical";
    assert_eq!(Shards::new().refusal(text), sentence);
    assert!(Shards::with(|spec| spec.categorical = vec!["bmi".into()]).dataset("f", text).is_ok());
    assert!(Shards::with(|spec| spec.drop = vec!["bmi".into()]).dataset("f", text).is_ok());
    for fine in ["?", "NA", "", "  "] {
        assert!(Shards::new().dataset("f", text.replace("n/a?", fine)).is_ok(), "{fine:?}");
    }
    let words = "size,y\n1,0\n2,1\nsmall,0\nlarge,1\n3,0\n";
    assert!(Shards::new().dataset("f", words).is_ok(), "words and numbers are categories");
}

#[test]
fn a_stray_word_among_labels_has_a_remedy_of_its_own() {
    assert_eq!(
        Shards::new().refusal("a,y\n1,0\n2,1\n3,late\n4,0\n"),
        "f.csv:4: label \"y\": \"late\" is not a number, and other labels are; correct the cell, leave it empty to leave the \
         row out, or set data.task to \"classification\""
    );
}

#[test]
fn a_file_of_one_column_is_one_with_another_separator() {
    assert_eq!(
        Shards::new().refusal("a;y\n1;0\n"),
        "f.csv:1: only one column, \"a;y\", expected the label and at least one to learn from; cells are separated by commas"
    );
}

#[test]
fn what_stands_in_a_cell_can_be_left_out_of_a_sentence() {
    let shards = Shards::with(|spec| spec.task = Some(LearningTask::Classification));
    for text in ["a,y\n1,0\n2,1\n3,1\nsecret,0\n", "a,y\n1,0\n1e400,1\n2,1\n", "a,y\n1,0\n2,0.625\n"] {
        let error = shards.dataset("f", text).unwrap_err();
        let cells = ["secret", "1e400", "0.625"];
        assert!(cells.iter().any(|cell| error.to_string().contains(cell)), "{error}");
        let told = error.without_cells().to_string();
        assert!(told.contains('…') && !cells.iter().any(|cell| told.contains(cell)), "{told}");
    }
}

#[test]
fn numbers_with_many_words_among_them_are_text_and_the_owner_is_told() {
    let text = "bmi,y\n20.5,0\n21,1\nnan,0\nnan,1\n23,0\n";
    let shards = Shards::new();
    let data = shards.dataset("f", text).unwrap();
    let [note] = data.notes() else { panic!("{:?}", data.notes()) };
    let told = note.to_string();
    let sentence = "f.csv: column \"bmi\" has 2 words among 3 numbers, the first on line 4, and is taken as text; if they \
                    mean that a value is missing, leave those cells empty";
    assert!(told.ends_with(sentence), "{told}");
    let asked = Shards::with(|spec| spec.categorical = vec!["bmi".into()]);
    assert!(asked.dataset("f", text).unwrap().notes().is_empty());
}

#[test]
fn a_number_that_no_float_holds_is_refused() {
    assert_eq!(
        Shards::new().refusal("a,y\n1,0\n1e400,1\n2,0\n"),
        "f.csv:3: column \"a\": \"1e400\" is not a finite number; correct the cell, or leave it empty"
    );
    let mut data = Shards::new().dataset("f", "a,y\n1e300,0\n-1e300,1\n2,0\n").unwrap();
    assert!(matches!(data.survey(1), Err(DataError::TooLarge { column, .. }) if column == "a"));
}

#[test]
fn the_label_is_found_by_name_by_configuration_or_last() {
    let label = |shards: &Shards, text: &str| shards.dataset("f", text).unwrap().label().to_owned();
    assert_eq!(label(&Shards::new(), "target,y,label\n1,2,3\n"), "label");
    assert_eq!(label(&Shards::new(), "a,y,b\n1,2,3\n"), "y");
    assert_eq!(label(&Shards::new(), "a,b,c\n1,2,3\n"), "c");
    assert_eq!(label(&Shards::with(|spec| spec.drop = vec!["c".into()]), "a,b,c\n1,2,3\n"), "b");
    let shards = Shards::with(|spec| spec.label = Some("late".into()));
    assert_eq!(
        shards.refusal("a,b\n1,2\n"),
        "f.csv: no column \"late\" for the label; there are \"a\", \"b\"; name this file's own with --label"
    );
    let table = shards.read("f", "delayed,b\n1,2\n0,3\n").unwrap();
    let own = Dataset::new(table, &shards.spec, Some("delayed"), 7, "f").unwrap();
    assert_eq!(own.label(), "late", "a worker's own name for the label becomes the fleet's");
}

#[test]
fn rows_without_a_label_are_left_out_and_counted() {
    let shards = Shards::new();
    let data = shards.dataset("f", "a,y\n1,0\n2,\n3,1\n4,?\n").unwrap();
    assert_eq!(data.training_rows(), 2);
    assert!(matches!(data.notes(), [Note::Unlabelled { count: 2, of: 4, .. }]));
    assert_eq!(shards.refusal("a,y\n1,\n2,NA\n"), "f.csv: no row has a label in column \"y\"");
}

#[test]
fn a_label_that_the_task_cannot_use_is_refused_with_its_line() {
    let classes = Shards::with(|spec| spec.task = Some(LearningTask::Classification));
    assert_eq!(
        classes.refusal("a,y\n1,0\n2,0.5\n3,1\n"),
        "f.csv:3: label \"y\": 0.5 is not a whole number, and data.task is \"classification\"; correct the cell, or set \
         data.task to \"regression\""
    );
    let numbers = Shards::with(|spec| spec.task = Some(LearningTask::Regression));
    assert_eq!(
        numbers.refusal("a,y\n1,0\n2,yes\n3,1\n"),
        "f.csv:3: label \"y\": \"yes\" is not a number, and the task is regression; correct the cell, or set data.task \
         to \"classification\""
    );
}

#[test]
fn more_classes_than_a_model_has_and_longer_names_are_refused() {
    let shards = Shards::new();
    let survey = |text: &str| shards.dataset("f", text).unwrap().survey(1).map_err(|error| shards.shown(&error));
    let many = "x,y\n".to_owned() + &(0..1001).map(|i| format!("{i},c{i}\n")).collect::<String>();
    assert_eq!(survey(&many).unwrap_err(), "f.csv: label \"y\" has 1001 classes, the most is 1000");
    let long = format!("x,y\n1,a\n2,{}\n", "b".repeat(257));
    assert_eq!(survey(&long).unwrap_err(), "f.csv:3: label \"y\": the class has 257 bytes, the most is 256");
    assert!(survey(&many.replace('c', "")).is_ok(), "a thousand numbers are no classes, but a number to be learned");
}

#[test]
fn a_column_that_the_configuration_names_in_vain_is_told() {
    let shards = Shards::with(|spec| (spec.drop, spec.categorical) = (vec!["tailnum".into()], vec!["b".into()]));
    let data = shards.dataset("f", "a,y\n1,0\n2,1\n").unwrap();
    let told: Vec<String> =
        data.notes().iter().map(|note| note.to_string().replace(shards.dir.path().to_str().unwrap(), "")).collect();
    assert_eq!(
        told,
        [
            "/f.csv: no column \"tailnum\", which data.drop names",
            "/f.csv: no column \"b\", which data.categorical names"
        ]
    );
}

#[test]
fn the_split_is_drawn_by_seed_and_name_and_keeps_every_row() {
    let shards = Shards::with(|spec| spec.validation_fraction = 0.2);
    let text = "a,y\n".to_owned() + &(0..100).map(|i| format!("{i},{}\n", i % 2)).collect::<String>();
    let held_out = |seed, name: &str| {
        let table = shards.read("f", &text).unwrap();
        let mut data = Dataset::new(table, &shards.spec, None, seed, name).unwrap();
        assert_eq!((data.training_rows(), data.held_out_rows()), (80, 20));
        let schema = merge(&BTreeMap::from([("f".to_owned(), data.survey(1).unwrap())]), &shards.spec).unwrap().schema;
        data.encode(&schema).unwrap()
    };
    assert_eq!(held_out(7, "f"), held_out(7, "f"));
    assert_ne!(held_out(7, "f"), held_out(8, "f"));
    assert_ne!(held_out(7, "f"), held_out(7, "g"));
    let one = shards.dataset("f", "a,y\n1,0\n").unwrap();
    assert_eq!((one.training_rows(), one.held_out_rows()), (1, 0), "one row is learned from");
}

#[test]
fn four_is_one_category_and_one_class_however_it_is_written() {
    let shards = Shards::with(|spec| spec.categorical = vec!["g".into()]);
    let schema = shards.schema(&[("a", "g,y\n4,4\n4,5\n4,4\n"), ("b", "g,y\n4.0,4.0\n4e0,5e0\nx,4\nx,4\n")]);
    assert_eq!(vocabulary(&schema, "g"), ["4", "x"]);
    assert_eq!(classes(&schema), ["4", "5"]);
    let rows = shards.dataset("b", "g,y\n4.0,5.0\n").unwrap().encode(&schema).unwrap().training;
    assert_eq!((rows.features(0), rows.targets()), (vec![1.0, 0.0, 0.0, 0.0], &[1.0][..]));
}

#[test]
fn a_column_is_numeric_only_where_it_is_numeric_everywhere() {
    let shards = Shards::new();
    let schema =
        shards.schema(&[("a", "n,g,e,y\n1,4,,p\n2,4,,q\n3,5,,p\n"), ("b", "n,g,e,y\n3,x,7,p\n5,x,8,q\n,4,9,p\n")]);
    // 1, 2, 3, 3, 5: mean 2.8, squared differences 8.8.
    let Encoding::Numeric { mean, deviation, missing: true } = encoding(&schema, "n") else { panic!() };
    assert!((mean - 2.8).abs() < 1e-12 && (deviation - (8.8f64 / 5.0).sqrt()).abs() < 1e-12);
    assert_eq!(vocabulary(&schema, "g"), ["4", "x"], "named by both, frequent enough in one");
    assert!(matches!(encoding(&schema, "e"), Encoding::Numeric { missing: true, .. }), "no value at one is no text");
    assert_eq!((schema.inputs(), schema.outputs()), (2 + 4 + 2, 2));
}

#[test]
fn statistics_do_not_depend_on_how_rows_are_spread() {
    let shards = Shards::new();
    let row = |i: i32| format!("{},{},{}\n", f64::from(i * i % 97) / 3.0, i % 3, f64::from(i) / 7.0);
    let file = |range: std::ops::Range<i32>| "a,b,y\n".to_owned() + &range.map(row).collect::<String>();
    let whole = shards.schema(&[("w", &file(0..300))]);
    let parts = shards.schema(&[("u", &file(0..10)), ("v", &file(10..180)), ("w", &file(180..300))]);
    assert_eq!(whole.columns.len(), parts.columns.len());
    for (a, b) in whole.columns.iter().zip(&parts.columns) {
        let (Encoding::Numeric { mean: m, deviation: d, .. }, Encoding::Numeric { mean: n, deviation: e, .. }) =
            (&a.encoding, &b.encoding)
        else {
            panic!("{a:?} {b:?}")
        };
        assert!((m - n).abs() < 1e-12 * m.abs() && (d - e).abs() < 1e-12 * d, "{a:?} {b:?}");
    }
}

#[test]
fn a_constant_has_deviation_one_and_an_absent_value_drops_the_column() {
    let shards = Shards::new();
    let frozen = shards.merge(&[("a", "c,e,y\n0.1,,p\n0.1,,q\n0.1,?,p\n")]).unwrap();
    assert_eq!(frozen.schema.columns.len(), 1);
    assert!(matches!(encoding(&frozen.schema, "c"), Encoding::Numeric { deviation: 1.0, missing: false, .. }));
    assert_eq!(frozen.dropped[0].reason, DropReason::Empty);
    assert_eq!(frozen.dropped[0].to_string(), "column \"e\" is dropped: it has no value anywhere");
}

#[test]
fn workers_that_propose_different_labels_are_both_named() {
    let error = Shards::new().merge(&[("a", "x,late\n1,0\n2,1\n"), ("b", "x,delay\n1,0\n2,1\n")]).unwrap_err();
    assert_eq!(error, MergeError::Labels(vec![("a".into(), "late".into()), ("b".into(), "delay".into())]));
    assert_eq!(
        error.to_string(),
        "workers differ on the label column: \"late\" at a, \"delay\" at b; set data.label, and on each worker whose \
         file calls it otherwise --label"
    );
}

#[test]
fn a_column_that_half_have_binds_the_rest_and_one_that_fewer_have_goes() {
    let shards = Shards::new();
    let (with, without) = ("k,x,y\n1,2,p\n3,4,q\n", "x,y\n2,p\n4,q\n");
    let half = shards.merge(&[("a", with), ("b", without)]).unwrap_err();
    assert_eq!(half, MergeError::Lacking(vec![("b".into(), "k".into())]));
    let fewer = shards.merge(&[("a", with), ("b", without), ("c", without)]).unwrap();
    assert_eq!(fewer.dropped[0].to_string(), "column \"k\" is dropped: 1 of 3 workers have it");
    let mixed = shards.schema(&[("a", with), ("b", "y,x,k\nq,4,3\np,2,1\n")]);
    assert_eq!(mixed.columns.len(), 2, "the same columns in another order are the same columns");
}

#[test]
fn one_class_at_one_worker_is_fine_and_in_the_whole_fleet_is_refused() {
    let shards = Shards::new();
    assert_eq!(classes(&shards.schema(&[("a", "x,y\n1,no\n2,no\n"), ("b", "x,y\n1,yes\n")])), ["no", "yes"]);
    let one = shards.merge(&[("a", "x,y\n1,no\n2,no\n"), ("b", "x,y\n1,no\n")]).unwrap_err();
    assert_eq!(
        one.to_string(),
        "every label of the whole fleet, in column \"y\", is \"no\", expected at least two classes; is it the right column \
         (data.label)?"
    );
}

#[test]
fn the_task_follows_from_the_labels_of_the_whole_fleet() {
    let file = |labels: &mut dyn Iterator<Item = String>| {
        "x,y\n".to_owned() + &labels.enumerate().map(|(i, y)| format!("{i},{y}\n")).collect::<String>()
    };
    let whole = |range: std::ops::Range<i32>| file(&mut range.map(|i| i.to_string()));
    let shards = Shards::new();
    let twenty = shards.schema(&[("a", &whole(0..12)), ("b", &whole(8..20))]);
    assert_eq!(classes(&twenty)[..3], ["0", "1", "2"], "numbers are in numeric order");
    assert_eq!(classes(&twenty).len(), 20);
    let more = shards.schema(&[("a", &whole(0..12)), ("b", &whole(9..21))]);
    assert!(matches!(more.target, Target::Regression { .. }));
    let fractions = shards.schema(&[("a", "x,y\n1,0.5\n2,1\n"), ("b", "x,y\n1,0\n2,1\n")]);
    assert!(matches!(fractions.target, Target::Regression { .. }));
    let text = shards.schema(&[("a", "x,y\n1,10\n2,9\n"), ("b", "x,y\n1,none\n2,9\n")]);
    assert_eq!(classes(&text), ["10", "9", "none"]);
    let forced = Shards::with(|spec| spec.task = Some(LearningTask::Regression));
    assert!(matches!(forced.schema(&[("a", "x,y\n1,0\n2,1\n")]).target, Target::Regression { .. }));
}

#[test]
fn rare_and_mostly_unique_text_is_not_named() {
    let shards = Shards::new();
    let rows = |i: i32| format!("{},id{i},{},{}\n", ["AA", "UA"][usize::from(i % 2 == 0)], i % 40 / 39, i % 2);
    let text = "carrier,tail,code,y\n".to_owned() + &(0..60).map(rows).collect::<String>() + "ZZ,id60,0,1\n";
    let mut data = shards.dataset("a", &text).unwrap();
    let survey = data.survey(5).unwrap();
    assert!(matches!(data.notes(), [Note::MostlyUnique { column, distinct: 61, .. }] if column == "tail"));
    let bytes = survey.to_bytes();
    let holds = |word: &[u8]| bytes.windows(word.len()).any(|window| window == word);
    assert!(holds(b"AA") && holds(b"UA") && !holds(b"ZZ") && !holds(b"id1"));
    let frozen = merge(&BTreeMap::from([("a".to_owned(), survey)]), &shards.spec).unwrap();
    assert_eq!(vocabulary(&frozen.schema, "carrier"), ["AA", "UA"]);
    assert_eq!(frozen.dropped[0].reason, DropReason::MostlyUnique);
    let rows = data.encode(&frozen.schema).unwrap().training;
    assert_eq!(rows.features(60)[..4], [0.0, 0.0, 1.0, 0.0], "what is not named is other");
}

#[test]
fn ten_thousand_categories_are_capped() {
    let shards = Shards::new();
    let row = |i: usize| format!("c{:05},{}\n", i % 10_000, i % 2);
    let text = "g,y\n".to_owned() + &(0..30_000).map(row).collect::<String>() + &"c00042,1\n".repeat(9);
    let survey = shards.survey("a", &text);
    assert!(survey.to_bytes().len() < 8 << 10);
    let schema = merge(&BTreeMap::from([("a".to_owned(), survey)]), &shards.spec).unwrap().schema;
    assert_eq!(vocabulary(&schema, "g").len(), 256);
    assert!(vocabulary(&schema, "g").contains(&"c00042"), "the most frequent are named");
}

#[test]
fn who_joins_later_brings_unseen_categories_but_no_unknown_class_or_missing_column() {
    let shards = Shards::new();
    let schema = shards.schema(&[("a", "g,x,y\nu,1,no\nu,2,yes\nv,3,no\nv,5,no\n")]);
    let encode = |text: &str| {
        let data = shards.dataset("late", text).unwrap();
        data.encode(&schema).map_err(|error| shards.shown(&error))
    };
    let rows = encode("y,extra,x,g\nyes,9,1,w\nno,9,,u\n").unwrap().training;
    assert_eq!(rows.features(0)[..4], [0.0, 0.0, 1.0, 0.0]);
    assert_eq!(rows.features(1), [1.0, 0.0, 0.0, 0.0, 0.0], "a missing number is the mean");
    assert_eq!(
        encode("g,x,y\nu,1,maybe\n").unwrap_err(),
        "late.csv:2: label \"y\": the class \"maybe\" is unknown; the fleet's classes are \"no\", \"yes\""
    );
    assert_eq!(
        encode("g,y\nu,no\n").unwrap_err(),
        "late.csv: no column \"x\", which the fleet's schema has; there are \"g\", \"y\""
    );
    assert!(
        encode("g,x,y\nu,wide,no\nv,narrow,no\n").unwrap_err().starts_with("late.csv:2: column \"x\": \"wide\" is not")
    );
}

#[test]
fn a_class_in_held_out_rows_only_is_known() {
    let shards = Shards::with(|spec| spec.validation_fraction = 0.5);
    for rare in 0..6 {
        let row = |i: usize| format!("{i},{}\n", if i == rare { "rare" } else { ["a", "b"][i % 2] });
        let text = "x,y\n".to_owned() + &(0..6).map(row).collect::<String>();
        let schema = shards.schema(&[("w", &text)]);
        assert!(classes(&schema).contains(&"rare"));
        assert!(shards.dataset("w", &text).unwrap().encode(&schema).is_ok());
    }
}

#[test]
fn a_dishonest_survey_or_schema_is_refused() {
    let shards = Shards::new();
    let survey = shards.survey("a", "g,x,y\nu,1,no\nu,2,yes\n").to_bytes();
    for cut in 0..survey.len() {
        assert!(Survey::from_bytes(&survey[..cut]).is_err(), "cut at {cut}");
    }
    assert!(Survey::from_bytes(&[&survey[..], &[0]].concat()).is_err());
    assert!(Survey::from_bytes(&vec![0; (16 << 20) + 1]).is_err());
    assert!(Schema::from_bytes(&vec![0; (16 << 20) + 1]).is_err());
    let mut swapped = survey.clone();
    let at = swapped.windows(2).position(|w| w == b"\x01g").unwrap();
    swapped[at + 1] = b'z';
    assert!(Survey::from_bytes(&swapped).unwrap_err().source().is_none(), "columns out of order");
    let schema = shards.schema(&[("a", "g,x,y\nu,1,no\nu,2,yes\n")]);
    let mut broken = schema.clone();
    broken.columns.reverse();
    assert!(Schema::from_bytes(&broken.to_bytes()).is_err());
    broken.columns.clear();
    assert!(Schema::from_bytes(&broken.to_bytes()).is_err());
}

#[test]
fn encoded_rows_survive_the_wire_and_foreign_ones_are_refused_whole() {
    let shards = Shards::new();
    let text = "g,x,y\nu,1,no\nu,2,yes\nv,7,no\n";
    let schema = shards.schema(&[("a", text)]);
    let rows = shards.dataset("a", text).unwrap().encode(&schema).unwrap().training;
    let mut union = learning::Rows::new(&schema);
    union.append(&rows.to_bytes(0, 2), &schema).unwrap();
    union.append(&rows.to_bytes(2, 3), &schema).unwrap();
    assert_eq!(union, rows);
    let mut foreign = rows.to_bytes(0, 3);
    assert!(union.append(&foreign[1..], &schema).is_err());
    let last = foreign.len() - 4;
    foreign[last..].copy_from_slice(&2.0f32.to_le_bytes());
    assert_eq!(union.append(&foreign, &schema), Err(learning::RowsError::Value { row: 2 }));
    assert_eq!(union, rows, "nothing of a refused block stays");
    // The cells of a row are its category's place, of four, and its number.
    for (cell, value) in [(0, 4.0), (0, 0.5), (0, -1.0), (0, f32::NAN), (1, f32::NAN), (1, 1e7), (1, f32::INFINITY)] {
        let mut foreign = rows.to_bytes(0, 3);
        foreign[12 + 4 * cell..][..4].copy_from_slice(&f32::to_le_bytes(value));
        assert_eq!(union.append(&foreign, &schema), Err(learning::RowsError::Value { row: 1 }), "{value} in {cell}");
    }
}
