//! Numbers that look drawn: SplitMix64, a counter through a mixing function. The same seed gives the same numbers on every
//! machine, so that placements, simulations and random models can be had again.

/// What the counter goes on by: the state after `n` numbers is `n` times this further.
pub const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The next number after the state, which goes on.
pub fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(STEP);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Mixes one word well enough that neighbouring inputs have unrelated outputs.
pub fn mix(word: u64) -> u64 {
    next(&mut { word })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_published_generator() {
        let mut state = 1_234_567;
        let drawn: Vec<u64> = (0..3).map(|_| next(&mut state)).collect();
        assert_eq!(
            drawn,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
        assert_eq!(mix(1_234_567), drawn[0]);
    }
}
