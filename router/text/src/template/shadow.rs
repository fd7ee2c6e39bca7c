//! Marks on characters: a shadowed character is another, unused one that templates carry along without noticing.
//!
//! The shadow of `c` is the private-use character 0x100000 + `c` (plane 16). One character stands for one
//! character, so positions in a shadowed rendering are positions in the plain one.

const BASE: u32 = 0x10_0000;
/// The last two code points of a plane are no characters.
const LAST: char = '\u{fffd}';

/// The shadow of a character, or `None` for characters outside the basic plane.
pub fn of(c: char) -> Option<char> {
    if c > LAST {
        return None;
    }
    char::from_u32(BASE + c as u32)
}

/// The character whose shadow this is.
pub fn original(c: char) -> Option<char> {
    (c as u32).checked_sub(BASE).and_then(char::from_u32)
}

/// JSON-escapes text so that its shadow rendering is the shadow of its plain rendering: a shadowed character stays
/// shadowed where the plain one would be written as it is.
pub fn write_escaped(text: &str, ensure_ascii: bool, out: &mut String) {
    let mut utf8 = [0; 4];
    for c in text.chars() {
        match original(c) {
            Some(plain) if is_plain(plain, ensure_ascii) => out.push(c),
            Some(plain) => {
                crate::json::write_escaped(plain.encode_utf8(&mut utf8), ensure_ascii, out);
            }
            None => crate::json::write_escaped(c.encode_utf8(&mut utf8), ensure_ascii, out),
        }
    }
}

/// Whether JSON writes this character as itself.
fn is_plain(c: char, ensure_ascii: bool) -> bool {
    c >= ' ' && c != '"' && c != '\\' && (c.is_ascii() || !ensure_ascii)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shadows_are_one_to_one() {
        for c in ['\0', '<', 'é', '｜', LAST] {
            assert_eq!(of(c).and_then(original), Some(c));
        }
        assert_eq!(of('🤔'), None);
        assert_eq!(original('a'), None);
    }

    #[test]
    fn escapes_like_the_original() {
        let text: String = "<\"é".chars().map(|c| of(c).unwrap()).collect();
        let (mut ascii, mut wide) = (String::new(), String::new());
        write_escaped(&text, true, &mut ascii);
        write_escaped(&text, false, &mut wide);
        let shadow = |c| of(c).unwrap();
        assert_eq!(ascii, format!("{}\\\"\\u00e9", shadow('<')));
        assert_eq!(wide, format!("{}\\\"{}", shadow('<'), shadow('é')));
    }
}
