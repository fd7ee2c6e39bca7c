//! Rounding of the definition.

use super::quantised;

#[test]
fn values_of_the_grid_stay_and_the_largest_is_exact() {
    let x = [448.0, -224.0, 1.0, -0.5, 0.0, 2.0f32.powi(-9)];
    let mut y = [f32::NAN; 6];
    quantised(&x, &mut y);
    assert_eq!(y, x);
}

#[test]
fn other_values_move_by_at_most_a_sixteenth() {
    let x: Vec<f32> = (0..128).map(|i| ((i * 37 % 128) as f32 - 63.3) * 0.37).collect();
    let mut y = vec![f32::NAN; 128];
    quantised(&x, &mut y);
    let largest = x.iter().fold(0f32, |most, x| most.max(x.abs()));
    for (x, y) in x.iter().zip(&y) {
        // Three bits of mantissa, half a step; below the normal numbers steps of 2^-9 of a scale.
        assert!(
            (x - y).abs() <= (x.abs() / 16.0).max(largest / 448.0 / 1024.0 * 1.01),
            "{x} became {y}"
        );
    }
}

#[test]
fn zeros_and_what_is_no_number_pass() {
    let mut y = [1.0; 3];
    quantised(&[0.0; 3], &mut y);
    assert_eq!(y, [0.0; 3]);
    quantised(&[1.0, f32::NAN, 3.0], &mut y);
    assert!(y[1].is_nan() && y[0].is_finite() && (y[2] - 3.0).abs() < 1e-6);
}
