//! What was compared and how far apart it was.

#[derive(Default)]
pub struct Report {
    /// Small shapes alone: for tools under which a kernel takes a hundred times as long.
    pub small: bool,
    checks: usize,
    failures: Vec<String>,
}

impl Report {
    /// Of shapes in order of size all, or the first `few`.
    pub fn some<'a, T>(&self, shapes: &'a [T], few: usize) -> &'a [T] {
        &shapes[..if self.small { few } else { shapes.len() }]
    }

    /// Relative 2-norm of the difference; NaN never passes.
    pub fn compare(&mut self, name: &str, found: &[f32], expected: &[f32], bound: f64) {
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let difference = square(
            &mut found
                .iter()
                .zip(expected)
                .map(|(a, b)| f64::from(*a) - f64::from(*b)),
        );
        let size = square(&mut expected.iter().map(|x| f64::from(*x)));
        let error = if size > 0.0 {
            (difference / size).sqrt()
        } else {
            difference.sqrt()
        };
        let unwritten = found.iter().filter(|x| x.is_nan()).count();
        let good = found.len() == expected.len() && error < bound;
        let verdict = if good { "ok" } else { "DIFFERS" };
        println!(
            "{verdict:8} {error:9.2e} < {bound:.0e}  {name}{}",
            if unwritten > 0 {
                format!("  ({unwritten} NaN)")
            } else {
                String::new()
            }
        );
        self.note(good, name);
    }

    /// Rows of `width` values: the median row's error, and how many rows are far off. A row whose token went to another
    /// expert than the reference's, by rounding of a close choice, differs by more than rounding; few may.
    pub fn compare_rows(
        &mut self,
        name: &str,
        found: &[f32],
        expected: &[f32],
        width: usize,
        bound: f64,
        share: f64,
    ) {
        let mut errors: Vec<f64> = found
            .chunks(width)
            .zip(expected.chunks(width))
            .map(|(a, b)| {
                let difference: f64 = a
                    .iter()
                    .zip(b)
                    .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
                    .sum();
                (difference / b.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>()).sqrt()
            })
            .map(|error| if error.is_nan() { f64::INFINITY } else { error })
            .collect();
        errors.sort_by(f64::total_cmp);
        let median = errors[errors.len() / 2];
        let far = errors.iter().filter(|error| **error > 4.0 * bound).count();
        let good =
            found.len() == expected.len() && median < bound && far as f64 <= share * errors.len() as f64;
        println!(
            "{:8} {median:9.2e} < {bound:.0e}  {name}, {far} of {} rows far",
            if good { "ok" } else { "DIFFERS" },
            errors.len()
        );
        self.note(good, name);
    }

    /// A plain condition, with what was seen.
    pub fn expect(&mut self, name: &str, good: bool, seen: &str) {
        println!("{:8} {seen:>18}  {name}", if good { "ok" } else { "DIFFERS" });
        self.note(good, name);
    }

    /// Every value of `found` has the bits of `expected`.
    pub fn same_bits(&mut self, name: &str, found: &[f32], expected: &[f32]) {
        let pairs = found.iter().zip(expected);
        let equal = pairs.filter(|(a, b)| a.to_bits() == b.to_bits()).count();
        self.expect(name, equal == found.len(), &format!("{equal} of {}", found.len()));
    }

    fn note(&mut self, good: bool, name: &str) {
        self.checks += 1;
        if !good {
            self.failures.push(name.to_owned());
        }
    }

    pub fn broken(&mut self, name: &str) {
        self.checks += 1;
        self.failures.push(format!("{name} (stopped)"));
    }

    /// The exit status.
    pub fn finish(self) -> i32 {
        println!("{} checks, {} failed", self.checks, self.failures.len());
        for failure in &self.failures {
            println!("  {failure}");
        }
        i32::from(!self.failures.is_empty())
    }
}
