//! RMSNorm against F64, and bit-equality.

use super::*;
use crate::simd::Isa;
use crate::testing::*;

#[test]
fn equals_f64_and_is_the_same_for_all_instruction_sets() {
    let mut random = Random::new(1);
    for width in [1, 7, 16, 33, 128, 1000, 3072] {
        for magnitude in [1e-4, 1.0, 1e4] {
            let x: Vec<f32> = random.vec(3 * width).into_iter().map(|x| x * magnitude).collect();
            let w = random.vec(width);
            let mut y = vec![f32::NAN; 3 * width];
            rmsnorm(Isa::detect(), &x, &w, 1e-6, &mut y);
            let mut expected = Vec::new();
            for x in x.chunks(width) {
                let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                let scale = 1.0 / (mean + 1e-6).sqrt();
                expected.extend(
                    x.iter()
                        .zip(&w)
                        .map(|(x, w)| f64::from(*x) * scale * f64::from(*w)),
                );
            }
            let bounds: Vec<f64> = expected.iter().map(|y| y.abs() * 1e-6 + 1e-12).collect();
            assert_close(&format!("width {width}"), &y, &expected, &bounds);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                let mut other = vec![f32::NAN; 3 * width];
                rmsnorm(isa, &x, &w, 1e-6, &mut other);
                assert_eq!(bits(&other), bits(&y), "{isa:?}");
                let mut in_place = x[..width].to_vec();
                rmsnorm_in_place(isa, &mut in_place, &w, 1e-6);
                assert_eq!(bits(&in_place), bits(&y[..width]), "{isa:?}");
            }
        }
    }
}
