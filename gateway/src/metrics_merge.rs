//! The metrics of several routers as one text: each family once, each sample with its router's label.

/// A family's comment lines and its samples.
struct Family<'a> {
    name: &'a str,
    comments: Vec<&'a str>,
    samples: String,
}

/// Merges the texts of routers. One router's text stays as it is, so that dashboards made for it fit.
pub(crate) fn merge(texts: &[(String, String)]) -> String {
    if let [(_, only)] = texts {
        let mut text = only.trim_end().trim_end_matches("# EOF").trim_end().to_owned();
        text.push('\n');
        return text;
    }
    let mut families: Vec<Family<'_>> = Vec::new();
    for (router, text) in texts {
        let label = format!("router=\"{}\"", escape(router));
        let mut current = 0;
        for line in text.lines().filter(|line| !line.is_empty() && *line != "# EOF") {
            if let Some(rest) = line.strip_prefix("# ") {
                let name = rest.split(' ').nth(1).unwrap_or_default();
                current = families
                    .iter()
                    .position(|family| family.name == name)
                    .unwrap_or_else(|| {
                        families.push(Family {
                            name,
                            comments: Vec::new(),
                            samples: String::new(),
                        });
                        families.len() - 1
                    });
                if !families[current].comments.contains(&line) {
                    families[current].comments.push(line);
                }
                continue;
            }
            if families.is_empty() {
                families.push(Family {
                    name: "",
                    comments: Vec::new(),
                    samples: String::new(),
                });
            }
            labelled(line, &label, &mut families[current].samples);
        }
    }
    let mut out = String::new();
    for family in families {
        for comment in family.comments {
            out.push_str(comment);
            out.push('\n');
        }
        out.push_str(&family.samples);
    }
    out
}

/// `name{a="b"} 1` or `name 1` with one label more.
fn labelled(line: &str, label: &str, out: &mut String) {
    let name_end = line.find(['{', ' ']).unwrap_or(line.len());
    let (name, rest) = line.split_at(name_end);
    out.push_str(name);
    out.push('{');
    out.push_str(label);
    match rest.strip_prefix('{') {
        Some(rest) if rest.starts_with('}') => out.push_str(rest),
        Some(rest) => {
            out.push(',');
            out.push_str(rest);
        }
        None => {
            out.push('}');
            out.push_str(rest);
        }
    }
    out.push('\n');
}

fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_come_once_and_samples_say_their_router() {
        let text = |value: u32| {
            format!(
                "# HELP a first\n# TYPE a gauge\na {value}\n# TYPE b counter\nb_total{{x=\"y {{\"}} {value}\n# EOF\n"
            )
        };
        let merged = merge(&[(String::from("one"), text(1)), (String::from("two"), text(2))]);
        let expected = "# HELP a first\n# TYPE a gauge\na{router=\"one\"} 1\na{router=\"two\"} 2\n\
                        # TYPE b counter\nb_total{router=\"one\",x=\"y {\"} 1\nb_total{router=\"two\",x=\"y {\"} 2\n";
        assert_eq!(merged, expected);
        assert_eq!(
            merge(&[(String::from("one"), String::from("a 1\n# EOF\n"))]),
            "a 1\n"
        );
        assert_eq!(merge(&[]), "");
    }
}
