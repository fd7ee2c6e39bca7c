//! `conclave bench --scenario agent`: each turn computes its new tokens alone, whatever the number of workers.

use std::process::Command;

use conclave_tests::server;

/// Tokens of a page: what is cached ends at one.
const PAGE: i64 = 16;

#[test]
fn only_new_tokens_of_a_turn_are_computed() {
    for backend in ["openai", "grpc"] {
        let sizes = [
            "--turns=6",
            "--shared-prefix-len=500",
            "--turn-input-len=40",
            "--turn-output-len=8",
        ];
        let output = Command::new(server::binary())
            .args([
                "bench",
                "--scenario",
                "agent",
                "--workers=2",
                "--backend",
                backend,
            ])
            .args(sizes)
            .envs(server::PATIENT)
            .output()
            .expect("conclave starts");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let table = String::from_utf8(output.stdout).expect("UTF-8");
        let rows: Vec<Vec<i64>> = table
            .lines()
            .map(|line| {
                line.split_whitespace()
                    .map_while(|word| word.parse().ok())
                    .collect()
            })
            .filter(|row: &Vec<i64>| row.len() >= 5)
            .collect();
        assert_eq!(rows.len(), 6, "{table}");
        for (at, row) in rows.iter().enumerate() {
            let [turn, prompt, cached, computed, new] = row[..5] else {
                panic!("{table}")
            };
            assert_eq!((turn, prompt - cached), (at as i64 + 1, computed), "{table}");
            assert_eq!(prompt, 540 + 48 * at as i64, "{table}");
            if at > 0 {
                assert!(new == 41 && computed < new + PAGE, "{table}");
            }
        }
        assert!(table.contains("cut by"), "{table}");
    }
}
