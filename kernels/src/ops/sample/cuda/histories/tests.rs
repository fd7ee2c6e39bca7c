//! Where tokens are kept, what is sent, and that the area comes back.

use super::*;

const WORDS: usize = 8 * UNIT;

fn step(histories: &mut Histories, id: u64, tokens: &[u32]) -> Option<Kept> {
    histories.begin_step();
    histories.place(id, tokens)
}

fn kept(from: usize, count: u32, to: usize) -> Option<Kept> {
    Some(Kept {
        from: from as u32,
        count,
        to: to as u32,
    })
}

#[test]
fn a_step_sends_what_came_since_the_last() {
    let histories = &mut Histories::new(WORDS);
    assert_eq!(step(histories, 1, &[5, 6, 7]), kept(0, 0, 0));
    // The device drew the fourth; the host does not know it, then knows it and gives two more.
    assert_eq!(step(histories, 1, &[5, 6, 7, SAMPLED | 3]), kept(0, 4, 0));
    assert_eq!(step(histories, 1, &[5, 6, 7, 8, SAMPLED]), kept(0, 5, 0));
    assert_eq!(step(histories, 1, &[5, 6, 7, 8, 9, 1, 2]), kept(0, 5, 0));
    // The same again, and fewer: another sequence, or one that begins anew.
    assert_eq!(step(histories, 1, &[5, 6, 7, 8, 9, 1, 2]), kept(0, 7, 0));
    assert_eq!(step(histories, 1, &[5]), kept(0, 0, 0));
    // Of two unknown ones only the last is there.
    assert_eq!(step(histories, 1, &[5, SAMPLED, SAMPLED]), kept(0, 1, 0));
}

#[test]
fn one_that_grows_moves_and_leaves_its_place_after_the_step() {
    let histories = &mut Histories::new(WORDS);
    let tokens = vec![1; 2 * UNIT];
    assert_eq!(step(histories, 1, &tokens[..5]), kept(0, 0, 0));
    assert_eq!(histories.place(2, &tokens[..5]), kept(0, 0, UNIT));
    // The drawn token needs a place, too.
    assert_eq!(step(histories, 1, &tokens[..UNIT - 1]), kept(0, 5, 0));
    assert_eq!(
        step(histories, 1, &tokens[..UNIT]),
        kept(0, UNIT as u32 - 1, 2 * UNIT)
    );
    assert_eq!(
        histories.place(3, &tokens[..5]),
        kept(0, 0, 5 * UNIT),
        "the old place is being read"
    );
    assert_eq!(step(histories, 4, &tokens[..5]), kept(0, 0, 0));
}

#[test]
fn who_was_not_used_goes_first_and_nobody_else_does() {
    let histories = &mut Histories::new(2 * UNIT);
    let tokens = [1; 3];
    step(histories, 1, &tokens);
    histories.place(2, &tokens);
    assert_eq!(histories.place(3, &tokens), None, "both were used in this step");
    assert_eq!(histories.place(2, &tokens), None, "twice in one step");
    step(histories, 2, &tokens);
    assert_eq!(histories.place(3, &tokens), None, "both were used lately");
    step(histories, 2, &tokens);
    assert_eq!(histories.place(3, &tokens), kept(0, 0, 0), "1 was not");
    assert_eq!(histories.place(1, &tokens), None);
    assert_eq!(step(histories, 4, &[1; 2 * UNIT]), None, "longer than the area");
}

#[test]
fn a_step_that_was_not_queued_leaves_nothing() {
    let histories = &mut Histories::new(WORDS);
    step(histories, 1, &[5, 6]);
    step(histories, 2, &[5, 6]);
    histories.place(1, &[5, 6, 7]);
    histories.forget_step();
    assert_eq!(step(histories, 1, &[5, 6, 7]), kept(0, 0, 0));
    histories.forget_step();
    histories.begin_step();
    assert_eq!(histories.free, BTreeMap::from([(0, WORDS as u32)]));
}
