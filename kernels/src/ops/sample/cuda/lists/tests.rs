//! What is packed, and what is left to the host.

use super::*;
use crate::backend::SAMPLED;

fn params() -> SampleParams {
    SampleParams {
        temperature: 1.0,
        seed: 1,
        ..SampleParams::default()
    }
}

fn row(params: &SampleParams) -> SampleRow<'_> {
    SampleRow {
        params,
        position: 3,
        tokens: &[],
        output_start: 0,
        history: None,
        mask: None,
        forbidden: &[],
    }
}

const VOCAB: usize = 100;

fn histories() -> Histories {
    Histories::new(4096)
}

fn area(rows: usize) -> Vec<u32> {
    vec![0xdead; bytes(rows, VOCAB) / 4]
}

/// Which of the rows are left to the host.
fn left(rows: &[SampleRow<'_>]) -> Vec<usize> {
    pack(rows, VOCAB, None, &mut area(rows.len())).on_host
}

#[test]
fn rows_without_lists_take_no_room() {
    let params = params();
    let packed = pack(
        &[row(&params), row(&params)],
        VOCAB,
        Some(&mut histories()),
        &mut area(2),
    );
    assert_eq!((packed.words, packed.on_host.len()), (0, 0));
    assert_eq!(packed.specs[1].token, 1);
    assert_eq!((packed.specs[1].position, packed.specs[1].extra), (0, u32::MAX));
}

#[test]
fn lists_lie_behind_the_headers() {
    let with_bias = SampleParams {
        logit_bias: vec![(9, 1.0), (4, 2.0), (9, -3.0)],
        frequency_penalty: 0.5,
        ..params()
    };
    let plain = params();
    let mask = [0x0f; 13];
    let rows = [
        row(&plain),
        SampleRow {
            tokens: &[8, 7, 6, 5, 4],
            output_start: 2,
            forbidden: &[1, 2],
            ..row(&with_bias)
        },
        SampleRow {
            mask: Some(&mask),
            ..row(&plain)
        },
    ];
    let mut area = area(3);
    let packed = pack(&rows, VOCAB, None, &mut area);
    assert!(packed.on_host.is_empty());
    let extras: Vec<u32> = packed.specs.iter().map(|spec| spec.extra).collect();
    assert_eq!((extras, packed.specs[1].position), (vec![u32::MAX, 0, 1], 3));
    let word = |row: usize, index: usize| area[row * EXTRA_WORDS + index] as usize;
    let list = |begin: usize, words: usize| {
        assert!(begin.is_multiple_of(ALIGN) && begin >= 2 * EXTRA_WORDS);
        area[begin..begin + words].to_vec()
    };
    let bits = f32::to_bits;
    assert_eq!(
        list(word(0, 1), 6),
        [4, bits(2.0), 9, bits(1.0), 9, bits(-3.0)],
        "by token, of one token in order"
    );
    assert_eq!(list(word(0, 3), 2), [1, 2]);
    assert_eq!(word(0, 6), 3, "the output alone: nothing looks at the prompt");
    assert_eq!((list(word(0, 5), 3), word(0, 10)), (vec![6, 5, 4], 0));
    assert_eq!(word(0, 0), 0);
    assert_eq!(list(word(1, 0), 4), [0x0f0f_0f0f, 0x0f0f_0f0f, 0x0f0f_0f0f, 0x0f]);
    assert!(packed.words <= area.len());
}

#[test]
fn what_the_kernels_do_not_take_is_left() {
    let good = params();
    let with = |change: &dyn Fn(&mut SampleParams)| {
        let mut params = params();
        change(&mut params);
        params
    };
    let bad = [
        with(&|p| p.temperature = -1.0),
        with(&|p| p.temperature = f32::NAN),
        with(&|p| p.temperature = f32::INFINITY),
        with(&|p| p.logprobs = Some(MAX_TOP as u32 + 1)),
        with(&|p| p.logit_bias = vec![(VOCAB as u32, 1.0)]),
    ];
    for params in &bad {
        assert_eq!(left(&[row(&good), row(params), row(&good)]), [1], "{params:?}");
    }
    let penalty = with(&|p| p.presence_penalty = 1.0);
    let unknown = SampleRow {
        tokens: &[VOCAB as u32],
        ..row(&penalty)
    };
    let forbidden = SampleRow {
        forbidden: &[0, VOCAB as u32],
        ..row(&good)
    };
    let mask = SampleRow {
        mask: Some(&[255; 12]),
        ..row(&good)
    };
    assert_eq!(left(&[unknown, forbidden, mask]), [0, 1, 2]);
    let most = with(&|p| p.logprobs = Some(MAX_TOP as u32));
    assert!(left(&[row(&most)]).is_empty());
    let (mut area, vocab) = (vec![0; 16], MAX_VOCAB + 1);
    assert_eq!(
        pack(&[row(&good)], vocab, Some(&mut histories()), &mut area).on_host,
        [0]
    );
    let greedy = with(&|p| p.temperature = 0.0);
    assert!(
        pack(&[row(&greedy)], vocab, Some(&mut histories()), &mut area)
            .on_host
            .is_empty()
    );
}

#[test]
fn lists_are_bounded_and_the_next_row_may_fit() {
    let penalty = SampleParams {
        repetition_penalty: 1.5,
        ..params()
    };
    let (long, short) = (vec![1; LIST_BYTES / 4 + 1000], vec![1; 1000]);
    let of = |tokens| SampleRow {
        tokens,
        ..row(&penalty)
    };
    assert_eq!(left(&[of(&short), of(&long), of(&short)]), [1]);
    let half = vec![1; LIST_BYTES / 8];
    assert_eq!(left(&[of(&half), of(&half), of(&half)]), [2]);
    let plain = params();
    let masks = vec![
        SampleRow {
            mask: Some(&[1; 13]),
            ..row(&plain)
        };
        MASKED_ROWS
    ];
    assert!(left(&masks).is_empty(), "as many masks as there is room for");
}

/// What is sent of the tokens, and the header's words about them: list, count, from, kept, to, where the output begins.
fn sent(rows: &[SampleRow<'_>], histories: &mut Histories) -> (Vec<u32>, [u32; 6]) {
    let mut area = area(rows.len());
    let packed = pack(rows, VOCAB, Some(histories), &mut area);
    assert!(packed.on_host.is_empty());
    let header = [5, 6, 7, 8, 9, 10].map(|word| area[word]);
    let list = area[header[0] as usize..][..header[1] as usize].to_vec();
    (list, header)
}

#[test]
fn of_a_sequence_that_is_kept_only_the_new_tokens_are_sent() {
    let penalties = SampleParams {
        presence_penalty: 0.5,
        ..params()
    };
    let of = |tokens, history| SampleRow {
        tokens,
        output_start: 2,
        history,
        ..row(&penalties)
    };
    let histories = &mut histories();
    // Nothing yet that counts: a place all the same, for the token that this step draws.
    assert_eq!(
        sent(&[of(&[8, 9], Some(1))], histories),
        (vec![], [0, 0, 0, 0, 0, 0])
    );
    assert_eq!(
        sent(&[of(&[8, 9, SAMPLED], Some(1))], histories),
        (vec![], [0, 0, 0, 1, 0, 0])
    );
    assert_eq!(
        sent(&[of(&[8, 9, 4, 5, 6], Some(1))], histories),
        (vec![5, 6], [16, 2, 0, 1, 0, 0])
    );
    assert_eq!(
        sent(&[of(&[8, 9, 4, 5, 6], None)], histories),
        (vec![4, 5, 6], [16, 3, 0, 0, u32::MAX, 0])
    );
    // A token that only the device could know, and does not: the host's.
    let packed = pack(
        &[of(&[8, 9, SAMPLED], Some(2))],
        VOCAB,
        Some(histories),
        &mut area(1),
    );
    assert_eq!(packed.on_host, [0]);
}
