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
    /// The cell of a column of numbers, in which NaN is what is missing.
    pub(crate) fn of(number: f64) -> Self {
        if number.is_nan() { Self::Missing } else { Self::Number(number) }
    }

    pub(crate) fn read(raw: &'a str) -> Self {
        if let Some(number) = decimal(raw.as_bytes()) {
            return Self::Number(number);
        }
        let text = trimmed(raw);
        if matches!(text, "" | "?" | "NA") {
            return Self::Missing;
        }
        // A number is made of these; `inf` and `nan` are words. Asked first: to have a word refused as a number takes longer.
        if !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E')) {
            return Self::Word(text);
        }
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Self::Number(number),
            _ => Self::Word(text),
        }
    }
}

/// What is nearly always there is nothing to trim, which two bytes tell.
fn trimmed(raw: &str) -> &str {
    match raw.as_bytes() {
        [first, .., last] if first.is_ascii_graphic() && last.is_ascii_graphic() => raw,
        _ => raw.trim(),
    }
}

/// The number that `text` is, if it is a plain decimal of at most 15 digits: then both the digits and the power of ten
/// are exact in an `f64`, and their quotient is rounded once, as the nearest number is (Clinger 1990).
fn decimal(text: &[u8]) -> Option<f64> {
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, text),
    };
    // One digit at least, and perhaps a point.
    if !(1..=DIGITS_MAX + 1).contains(&digits.len()) {
        return None;
    }
    let (mut all, mut point) = (0u64, None);
    for (at, &byte) in digits.iter().enumerate() {
        match byte {
            b'0'..=b'9' => all = all * 10 + u64::from(byte - b'0'),
            b'.' if point.is_none() => point = Some(at),
            _ => return None,
        }
    }
    let count = digits.len() - usize::from(point.is_some());
    if !(1..=DIGITS_MAX).contains(&count) {
        return None;
    }
    #[allow(clippy::cast_precision_loss)] // below 10^15
    let all = all as f64;
    let number = point.map_or(all, |at| all / POWERS_OF_TEN[count - at]);
    Some(if negative { -number } else { number })
}

const DIGITS_MAX: usize = 15;

const POWERS_OF_TEN: [f64; DIGITS_MAX + 1] =
    [1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15];

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

    fn bits(cell: Cell<'_>) -> Option<u64> {
        if let Cell::Number(number) = cell { Some(number.to_bits()) } else { None }
    }

    fn parsed(text: &str) -> Option<u64> {
        text.parse::<f64>().ok().filter(|number| number.is_finite()).map(f64::to_bits)
    }

    #[test]
    fn odd_decimals_are_what_the_standard_library_reads() {
        for text in [
            "0",
            "-0",
            "-0.0",
            ".5",
            "5.",
            "-.5",
            ".",
            "-",
            "-.",
            "--1",
            "1.2.3",
            "+1",
            "0.1",
            "0.3",
            "1e5",
            "1e",
            "00012",
            "999999999999999",
            "9999999999999999",
            "9007199254740993",
            ".000000000000001",
            "0.00000000000000001",
            "123456789.123456",
            "1234567890.1234567",
            "-999999999999.999",
            "0x10",
            "1_000",
            "12 3",
            "١",
        ] {
            assert_eq!(bits(Cell::read(text)), parsed(text), "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_decimal_is_what_the_standard_library_reads(text in "-?[0-9]{0,12}[.]?[0-9]{0,12}") {
            proptest::prop_assert_eq!(bits(Cell::read(&text)), parsed(&text));
        }

        #[test]
        fn a_number_that_was_written_is_read_back(number: f32, places in 0usize..9) {
            let text = format!("{number:.places$}");
            proptest::prop_assert_eq!(bits(Cell::read(&text)), parsed(&text));
        }
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
