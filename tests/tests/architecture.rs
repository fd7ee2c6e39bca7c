//! ARCHITECTURE.md says where each invariant is kept and proved; here the files are asked whether they know.

use std::fs;

use conclave_tests::data;

/// The texts between backticks.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// Whether the file's head has a line like `Keeps invariants S1 and S2 of ARCHITECTURE.md.` with this invariant.
fn says(path: &str, verb: &str, invariant: &str) -> bool {
    let text = fs::read_to_string(data::root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let start = format!("{verb} invariant");
    let words = text
        .lines()
        .filter(|line| line.contains(&start) && line.ends_with("of ARCHITECTURE.md."))
        .flat_map(|line| line.split([' ', ',']));
    words.into_iter().any(|word| word == invariant)
}

#[test]
fn every_invariant_is_cited_by_the_code_that_keeps_it_and_the_test_that_proves_it() {
    let text = fs::read_to_string(data::root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let (_, section) = text.split_once("\n## Invariants\n").expect("the section");
    let table = section
        .lines()
        .skip_while(|line| !line.starts_with("|---"))
        .skip(1);
    let mut count = 0;
    for row in table.take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let (invariant, kept, proved) = (cells[1], quoted(cells[3]), quoted(cells[4]));
        assert!(!kept.is_empty() && !proved.is_empty(), "{row}");
        for (verb, paths) in [("Keeps", kept), ("Proves", proved)] {
            for path in paths {
                assert!(
                    says(path, verb, invariant),
                    "{path} does not say: {verb} invariant {invariant}"
                );
            }
        }
        count += 1;
    }
    assert!(count >= 17, "{count} invariants");
}
