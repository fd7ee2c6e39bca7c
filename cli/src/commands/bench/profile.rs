//! The kernels of one step, each timed alone.

use std::collections::BTreeMap;

/// Sums by name, largest first.
pub fn print(title: &str, kernels: &[(String, f64)]) {
    let mut sums = BTreeMap::<&str, (usize, f64)>::new();
    for (name, seconds) in kernels {
        let (count, sum) = sums.entry(name).or_default();
        (*count, *sum) = (*count + 1, *sum + seconds);
    }
    let total: f64 = sums.values().map(|(_, sum)| sum).sum();
    let mut rows: Vec<_> = sums.into_iter().collect();
    rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    println!("    {title}, each kernel alone: {:.3} ms in all", total * 1e3);
    for (name, (count, sum)) in rows {
        println!(
            "    {name:32} {count:5} x {:9.2} us {:5.1}%",
            sum / count as f64 * 1e6,
            100.0 * sum / total
        );
    }
}
