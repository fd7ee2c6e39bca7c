//! Module patterns of quantisation configs, matched against a module's name such as
//! `model.layers.3.block_sparse_moe.gate`.
//!
//! A plain pattern matches a run of whole name parts (`gate` matches `….gate`, not `….gate_proj`). A pattern with
//! `re:` is a regular expression that must match from the start; of those, literals, `\.`, `.`, `.*` and a final `$`
//! are understood, which is what published checkpoints use. One with other constructs matches nothing.

/// Whether `pattern` names `module`.
pub fn matches(pattern: &str, module: &str) -> bool {
    match pattern.strip_prefix("re:") {
        Some(regex) => parse(regex).is_some_and(|items| match_items(&items, module.as_bytes())),
        None => contains_parts(module, pattern),
    }
}

fn contains_parts(module: &str, pattern: &str) -> bool {
    let module: Vec<&str> = module.split('.').collect();
    let pattern: Vec<&str> = pattern.split('.').collect();
    module.windows(pattern.len()).any(|window| window == pattern)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    Literal(u8),
    Any,
    /// `.*`
    Rest,
    End,
}

fn parse(regex: &str) -> Option<Vec<Item>> {
    let mut items = Vec::new();
    let mut bytes = regex.bytes().peekable();
    while let Some(byte) = bytes.next() {
        items.push(match byte {
            b'^' if items.is_empty() => continue,
            b'$' if bytes.peek().is_none() => Item::End,
            b'.' if bytes.peek() == Some(&b'*') => {
                bytes.next();
                Item::Rest
            }
            b'.' => Item::Any,
            b'\\' => match bytes.next() {
                Some(escaped) if escaped.is_ascii_punctuation() => Item::Literal(escaped),
                _ => return None,
            },
            b'^' | b'$' | b'*' | b'+' | b'?' | b'(' | b')' | b'[' | b']' | b'{' | b'}' | b'|' => return None,
            literal => Item::Literal(literal),
        });
    }
    Some(items)
}

/// Glob matching: on a mismatch, go back to the latest `.*` and let it take one byte more. Quadratic at worst.
fn match_items(items: &[Item], text: &[u8]) -> bool {
    let (mut item, mut at) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    loop {
        let step = match items.get(item) {
            None => return true,
            Some(Item::Rest) => {
                retry = Some((item + 1, at));
                item += 1;
                continue;
            }
            Some(Item::End) if at == text.len() => return true,
            Some(Item::End) => false,
            Some(Item::Any) => at < text.len(),
            Some(Item::Literal(byte)) => text.get(at) == Some(byte),
        };
        if step {
            item += 1;
            at += 1;
            continue;
        }
        match retry {
            Some((from, start)) if start < text.len() => {
                retry = Some((from, start + 1));
                (item, at) = (from, start + 1);
            }
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn plain_patterns_match_whole_parts() {
        let gate = "model.layers.3.block_sparse_moe.gate";
        assert!(matches("gate", gate));
        assert!(matches("block_sparse_moe.gate", gate));
        assert!(matches("lm_head", "lm_head"));
        assert!(!matches("gate", "model.layers.3.mlp.gate_proj"));
        assert!(!matches("moe.gate", gate));
    }

    #[test]
    fn regular_expressions_of_published_checkpoints() {
        let gate = "model.layers.3.block_sparse_moe.gate";
        assert!(matches(r"re:.*block_sparse_moe\.gate$", gate));
        assert!(matches("re:.*self_attn.*", "model.layers.0.self_attn.q_proj"));
        assert!(!matches("re:.*self_attn.*", gate));
        assert!(!matches(
            r"re:.*moe\.gate$",
            "model.layers.3.block_sparse_moe.gate_proj"
        ));
        assert!(!matches("re:self_attn", "model.layers.0.self_attn.q_proj"));
        // A construct that is not understood matches nothing.
        assert!(!matches("re:.*(gate|head)", gate));
    }
}
