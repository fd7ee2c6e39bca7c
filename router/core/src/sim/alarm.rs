//! Does the alarm work? Bugs planted in the core, and mistakes made between the core and the wire, must each be found
//! by a few seeds.

use crate::api::Command;
use crate::planted::{Bug, plant};
use crate::sim::random::Random;
use crate::sim::scenario::{Tamper, run_seed};

/// Seeds in which each bug must show.
const SEEDS: u64 = 300;

fn found_by(bug: Option<Bug>, tamper: Option<Tamper>) -> Option<(u64, String)> {
    plant(bug);
    let found = (0..SEEDS).find_map(|seed| run_seed(seed, tamper).err().map(|problem| (seed, problem)));
    plant(None);
    found
}

#[test]
fn every_planted_bug_is_found() {
    let bugs = [
        Bug::TrustUnprovenPages,
        Bug::AcceptStaleEpoch,
        Bug::ShareWithinStep,
        Bug::ForgetEnd,
        Bug::CacheWholePrompt,
        Bug::OverlookStopToken,
        Bug::ReadmitTooEarly,
        Bug::MissPageBoundary,
        Bug::LeakOnEnd,
        Bug::ForgetReference,
        Bug::UnboundedQueue,
        Bug::RepeatPromptLogprobs,
    ];
    for bug in bugs {
        let Some((seed, problem)) = found_by(Some(bug), None) else {
            panic!("{SEEDS} seeds do not find {bug:?}");
        };
        println!("{bug:?}: seed {seed}: {problem:.100}");
    }
}

#[test]
fn every_mistake_on_the_way_is_found() {
    let mistakes: [(&str, Tamper); 9] = [
        ("a token delivered twice", |random, commands| {
            repeat(random, commands, |command| {
                matches!(command, Command::Deliver { .. })
            });
        }),
        ("a token lost", |random, commands| {
            lose(random, commands, |command| {
                matches!(command, Command::Deliver { .. })
            });
        }),
        ("an end said twice", |random, commands| {
            repeat(random, commands, |command| {
                matches!(command, Command::Finish { .. })
            });
        }),
        ("an end never said", |random, commands| {
            lose(random, commands, |command| {
                matches!(command, Command::Finish { .. })
            });
        }),
        ("a step sent twice", |random, commands| {
            repeat(random, commands, |command| {
                matches!(command, Command::Step { .. })
            });
        }),
        ("a wrong page", |random, commands| {
            for start in steps(random, commands).flat_map(|plan| &mut plan.start) {
                start.pages.iter_mut().for_each(|page| page.0 ^= 1);
            }
        }),
        ("a page not appended", |random, commands| {
            steps(random, commands).for_each(|plan| plan.pages.clear())
        }),
        ("a mask lost", |random, commands| {
            for run in steps(random, commands).flat_map(|plan| &mut plan.runs) {
                run.mask = None;
            }
        }),
        ("history lost", |random, commands| {
            for start in steps(random, commands).flat_map(|plan| &mut plan.start) {
                start.history.clear();
            }
        }),
    ];
    for (name, mistake) in mistakes {
        let Some((seed, problem)) = found_by(None, Some(mistake)) else {
            panic!("{SEEDS} seeds do not find {name}");
        };
        println!("{name}: seed {seed}: {problem:.100}");
    }
}

fn repeat(random: &mut Random, commands: &mut Vec<Command>, which: fn(&Command) -> bool) {
    let found = commands.iter().position(which).filter(|_| random.chance(10));
    if let Some(at) = found {
        commands.insert(at, commands[at].clone());
    }
}

fn lose(random: &mut Random, commands: &mut Vec<Command>, which: fn(&Command) -> bool) {
    let found = commands.iter().position(which).filter(|_| random.chance(10));
    if let Some(at) = found {
        commands.remove(at);
    }
}

/// All plans of this event, at times.
fn steps<'a>(
    random: &mut Random,
    commands: &'a mut [Command],
) -> impl Iterator<Item = &'a mut crate::api::StepPlan> + use<'a> {
    let now = random.chance(20);
    commands
        .iter_mut()
        .filter(move |_| now)
        .filter_map(|command| match command {
            Command::Step { plan, .. } => Some(plan),
            _ => None,
        })
}
