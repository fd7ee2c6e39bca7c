//! Placements: every expert somewhere, never more on a rank than fits, and lies refused.

use conclave_plan::placement::{LayerPlacement, Placement};

fn sizes(placement: &Placement) -> Vec<usize> {
    (0..placement.ranks)
        .map(|rank| placement.experts_of(0, rank).len())
        .collect()
}

#[test]
fn enough_room_gives_the_even_placement() {
    assert_eq!(Placement::fit(256, &[256; 5]), Ok(Placement::even(256, 5)));
    assert_eq!(Placement::fit(6, &[2, 2, 2]), Ok(Placement::even(6, 3)));
    assert_eq!(Placement::fit(2, &[u32::MAX; 3]), Ok(Placement::even(2, 3)));
}

#[test]
fn small_ranks_hold_what_fits_and_the_others_the_rest() {
    let fit = |experts, capacities: &[u32]| sizes(&Placement::fit(experts, capacities).expect("fits"));
    assert_eq!(fit(16, &[2, 16, 16]), [2, 7, 7]);
    assert_eq!(fit(256, &[160, 40, 0, 160]), [108, 40, 0, 108]);
    assert_eq!(fit(5, &[1, 1, 3]), [1, 1, 3]);
    let placement = Placement::fit(256, &[160, 40, 0, 160]).expect("fits");
    assert_eq!(placement.check(62), Ok(()));
    assert_eq!(placement.experts_of(0, 1), (108..148).collect::<Vec<u32>>());
}

#[test]
fn too_little_room_is_an_error_with_figures() {
    let error = Placement::fit(256, &[100, 100]).expect_err("no room").to_string();
    assert!(
        error.contains("256 experts per layer, room for 200 on 2 ranks"),
        "{error}"
    );
    assert!(Placement::fit(256, &[]).is_err());
    assert!(Placement::fit(5000, &[5000]).is_err());
    assert!(Placement::fit(4, &[1; 4097]).is_err());
}

#[test]
fn a_placement_that_breaks_the_rules_is_refused() {
    let good = Placement::even(4, 2);
    assert_eq!(good.check(3), Ok(()));
    let with = |owners: Vec<Vec<u32>>| Placement {
        layers: vec![LayerPlacement { owners }],
        ..good.clone()
    };
    let one = vec![0];
    for (placement, part) in [
        (with(vec![one.clone(); 3]), "layer 0 has 3 experts, not 4"),
        (
            with(vec![one.clone(), one.clone(), one.clone(), vec![]]),
            "expert 3 of layer 0 is on []",
        ),
        (
            with(vec![one.clone(), vec![2], one.clone(), one.clone()]),
            "expert 1 of layer 0 is on [2]",
        ),
        (
            with(vec![one.clone(), vec![1, 0], one.clone(), one.clone()]),
            "[1, 0]",
        ),
        (
            with(vec![one.clone(), vec![1, 1], one.clone(), one.clone()]),
            "[1, 1]",
        ),
        (
            Placement {
                ranks: 0,
                ..good.clone()
            },
            "0 ranks",
        ),
        (
            Placement {
                ranks: 5000,
                ..good.clone()
            },
            "5000 ranks",
        ),
        (
            Placement {
                experts: u32::MAX,
                ..good.clone()
            },
            "4294967295 experts",
        ),
        (
            Placement {
                layers: vec![good.layers[0].clone(); 2],
                ..good.clone()
            },
            "it has 2 layers, the model 3",
        ),
    ] {
        let error = placement.check(3).expect_err(part).to_string();
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
    // Replicas are allowed.
    assert_eq!(with(vec![vec![0, 1]; 4]).check(3), Ok(()));
}
