//! What one cell of a table says: nothing, a number, or a word.
//!
//! A cell that reads as a finite number is that number everywhere, also where it names a category or a class: `4`,
//! `4.0` and `4e0` are one value, written `4`. Blank, `?` and `NA` are missing, and nothing else is.

/// One cell, read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Cell<'a> {
    /// Blank, `?` or `NA`.
    Missing,
    /// A finite number.
    Number(f64),
    /// Anything else, trimmed.
    Word(&'a str),
}

impl<'a> Cell<'a> {
    pub(crate) fn read(raw: &'a str) -> Self {
        let text = raw.trim();
        if matches!(text, "" | "?" | "NA") {
            return Self::Missing;
        }
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Self::Number(number),
            _ => Self::Word(text),
        }
    }
}

/// Whether `word` is a number that no `f64` holds, such as `1e400`.
pub(crate) fn overflows(word: &str) -> bool {
    word.contains(|c: char| c.is_ascii_digit()) && word.parse::<f64>().is_ok_and(f64::is_infinite)
}

/// The one way to write `number`: the shortest text that reads as it.
pub(crate) fn written(number: f64) -> String {
    let size = number.abs();
    if size == 0.0 {
        "0".to_owned()
    } else if (1e-5..1e16).contains(&size) {
        number.to_string()
    } else {
        format!("{number:e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_one_value_however_it_is_written() {
        for text in ["4", "4.0", "4e0", " +4 ", "0.4e1"] {
            assert_eq!(Cell::read(text), Cell::Number(4.0), "{text:?}");
        }
        assert_eq!(written(4.0), "4");
        assert_eq!(written(-0.0), "0");
        assert_eq!(written(0.1 + 0.2), "0.30000000000000004");
        assert_eq!(written(1e300), "1e300");
    }

    #[test]
    fn only_blank_question_mark_and_na_are_missing() {
        for text in ["", "  ", "?", " NA "] {
            assert_eq!(Cell::read(text), Cell::Missing, "{text:?}");
        }
        for text in ["nan", "na", "N/A", "null", "inf", "-", "1e400", "n/a?"] {
            assert_eq!(Cell::read(text), Cell::Word(text), "{text:?}");
        }
    }

    #[test]
    fn what_no_float_holds_is_told_from_text() {
        assert!(overflows("1e400") && overflows("-9e999"));
        assert!(!overflows("inf") && !overflows("12e3x") && !overflows("1e300"));
    }
}
