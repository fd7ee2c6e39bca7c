//! Processes of ranks that are killed before, inside and after exchanges recorded in a graph: every survivor's wait must
//! end by its deadline (or at once, with `--abort`), its device must stay usable, and the survivors' next mapping must
//! work within half a second. Then another process takes the place of the dead one.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout};
use std::time::{Duration, Instant};

use conclave_kernels::cuda::exchange::ExchangeShape;
use conclave_kernels::cuda::exchange::ipc::Epoch;
use conclave_kernels::cuda::exchange::station::{Family, Station, Until};

use crate::Options;
use crate::cases::{Holding, Random, Routing, Tokens, placement};
use crate::link::spawn;
use crate::rank::{self, hex};

const SIZES: (usize, usize, usize) = (3072, 8, 256);
const LAYERS: usize = 4;
/// What a wait may last beyond its deadline, and the next mapping altogether.
const SLACK: Duration = Duration::from_millis(150);
const MAPPING: Duration = Duration::from_millis(500);

/// Processes that start before they are needed.
const AHEAD: usize = 6;

fn shape(ranks: usize) -> ExchangeShape {
    ExchangeShape::new(ranks, SIZES.0, SIZES.1, 0, true)
}

/// A rank that does what its parent says, a line at a time.
pub fn child(options: &Options) {
    let ordinal = options.child.unwrap() % options.gpus;
    let mut station = Station::open(ordinal as i32, &[shape(options.ranks[0])], options.nccl).unwrap();
    let control = station.control();
    let say = |line: String| {
        println!("{line}");
        std::io::stdout().flush().unwrap();
    };
    let (send, commands) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            let Ok(line) = line else { break };
            if line == "abort" {
                control.abort();
            } else if send.send(line).is_err() {
                break;
            }
        }
    });
    say("ready".into());
    let mut graph = None;
    let mut expected = Vec::new();
    let mut state = Vec::new();
    while let Ok(line) = commands.recv() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[0] {
            "offer" => {
                // Recorded for the epoch before.
                drop(graph.take());
                let handle = station.offer();
                say(handle.map_or("-".into(), |handle| hex(&handle.to_bytes())));
            }
            "connect" => {
                let place: usize = words[2].parse().unwrap();
                let peers: Vec<String> = words[3..].iter().map(ToString::to_string).collect();
                let placement = placement(Holding::Even, SIZES.2, peers.len());
                let epoch = Epoch {
                    number: words[1].parse().unwrap(),
                    rank: place,
                    shape: shape(peers.len()),
                    placement: &placement,
                    layers: 1,
                    timeout: Duration::from_millis(options.timeout_ms),
                };
                let start = Instant::now();
                rank::connect(&mut station, &epoch, &peers, options.nccl);
                let tokens = Tokens::new(place as u64, 4, SIZES, Routing::Uniform, peers.len());
                station.set_tokens(&tokens.station()).unwrap();
                station.begin(Family::Few, 4).unwrap();
                expected = tokens.expected(LAYERS, None);
                state.clone_from(&tokens.state);
                graph = Some(station.record(Family::Few, LAYERS, Until::All).unwrap());
                say(format!("connected {}", start.elapsed().as_micros()));
            }
            "run" => {
                station.set_hidden(&state).unwrap();
                station.launch(graph.as_ref().unwrap()).unwrap();
                let right = station.hidden().unwrap() == expected;
                say(format!("ran {right} {:?}", station.control().fault()));
            }
            "survive" => {
                let outcome = loop {
                    let start = Instant::now();
                    let launched = station.launch(graph.as_ref().unwrap());
                    let outcome = launched.and_then(|()| station.wait());
                    if outcome.is_err() || station.control().fault().is_some() {
                        break format!(
                            "{outcome:?} {} {:?}",
                            start.elapsed().as_millis(),
                            station.control().fault()
                        );
                    }
                };
                say(format!("fault {outcome}"));
            }
            other => panic!("unknown command {other}"),
        }
    }
}

struct Rank {
    process: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    ready: bool,
}

impl Rank {
    fn new(options: &Options, place: usize) -> Rank {
        let mut process = spawn(options, options.ranks[0], place);
        Rank {
            input: process.stdin.take().unwrap(),
            output: BufReader::new(process.stdout.take().unwrap()).lines(),
            process,
            ready: false,
        }
    }

    fn say(&mut self, line: &str) {
        let _ = writeln!(self.input, "{line}").and_then(|()| self.input.flush());
    }

    fn hear(&mut self) -> String {
        match self.output.next() {
            Some(Ok(line)) => line,
            _ => "gone".into(),
        }
    }

    fn ready(&mut self) {
        if !self.ready {
            self.ready = self.hear() == "ready";
        }
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn all(ranks: &mut [Rank], line: &str) -> Vec<String> {
    for rank in ranks.iter_mut() {
        rank.say(line);
    }
    ranks.iter_mut().map(Rank::hear).collect()
}

/// Connects and runs once; `Err`: what was wrong.
fn connect(ranks: &mut [Rank], epoch: &mut u32) -> Result<Duration, String> {
    let start = Instant::now();
    *epoch += 1;
    let mut handles = all(ranks, "offer");
    if handles[0] == "-" {
        handles = vec![rank::draw(); ranks.len()];
    }
    for (index, rank) in ranks.iter_mut().enumerate() {
        rank.say(&format!("connect {epoch} {index} {}", handles.join(" ")));
    }
    let heard: Vec<String> = ranks.iter_mut().map(Rank::hear).collect();
    if !heard.iter().all(|line| line.starts_with("connected")) {
        return Err(format!("connecting: {heard:?}"));
    }
    let heard = all(ranks, "run");
    if !heard.iter().all(|line| line == "ran true None") {
        return Err(format!("the first exchanges: {heard:?}"));
    }
    Ok(start.elapsed())
}

pub fn kill(options: &Options) -> i32 {
    let count = options.ranks[0];
    let random = &mut Random(7);
    let mut epoch = 0;
    let mut ranks: Vec<Rank> = (0..count).map(|place| Rank::new(options, place)).collect();
    ranks.iter_mut().for_each(Rank::ready);
    let limit = Duration::from_millis(options.timeout_ms) + SLACK;
    let (mut failed, mut slowest_wait, mut slowest_mapping) = (0, Duration::ZERO, Duration::ZERO);
    let mut phases = [0; 3];
    let victims: Vec<usize> = (0..options.times).map(|_| random.below(count)).collect();
    // The dead are replaced in their places, so it is known now who will be needed where.
    let mut successors: VecDeque<Rank> = victims
        .iter()
        .take(AHEAD)
        .map(|place| Rank::new(options, *place))
        .collect();
    let mut leaving = Vec::new();
    let began = Instant::now();
    let (mut waits, mut mend) = (Vec::new(), Duration::ZERO);
    for time in 0..options.times {
        if let Err(problem) = connect(&mut ranks, &mut epoch) {
            println!("FAILED   kill {time}: {problem}");
            failed += 1;
            break;
        }
        let phase = time % 3;
        phases[phase] += 1;
        let victim = victims[time];
        let survivors = |index: usize| index != victim || phase == 1;
        for (index, rank) in ranks.iter_mut().enumerate() {
            if survivors(index) && phase < 2 {
                rank.say("survive");
            }
        }
        std::thread::sleep(Duration::from_micros(2000 + random.below(20_000) as u64));
        let mut dead = ranks.remove(victim);
        let killed = Instant::now();
        let _ = dead.process.kill();
        if phase == 2 {
            ranks.iter_mut().for_each(|rank| rank.say("survive"));
        }
        if options.abort {
            ranks.iter_mut().for_each(|rank| rank.say("abort"));
        }
        let heard: Vec<String> = ranks.iter_mut().map(Rank::hear).collect();
        let waited = killed.elapsed();
        slowest_wait = slowest_wait.max(waited);
        waits.push(waited);
        if waited > limit || !heard.iter().all(|line| line.starts_with("fault Ok(())")) {
            println!("FAILED   kill {time}, phase {phase}: after {waited:?}: {heard:?}");
            failed += 1;
        }
        match connect(&mut ranks, &mut epoch) {
            Ok(took) => {
                slowest_mapping = slowest_mapping.max(took);
                if took > MAPPING {
                    println!("FAILED   kill {time}: the survivors' next mapping took {took:?}");
                    failed += 1;
                }
            }
            Err(problem) => {
                println!("FAILED   kill {time}: the survivors: {problem}");
                failed += 1;
                break;
            }
        }
        // The driver takes its time to clear a process away.
        leaving.push(std::thread::spawn(move || drop(dead)));
        let start = Instant::now();
        if let Some(place) = victims.get(time + AHEAD) {
            successors.push_back(Rank::new(options, *place));
        }
        if let Some(mut next) = successors.pop_front() {
            next.ready();
            ranks.insert(victim, next);
        }
        mend += start.elapsed();
    }
    let kills = phases.iter().sum::<usize>();
    let per_kill = began.elapsed() / kills.max(1) as u32;
    for left in leaving {
        let _ = left.join();
    }
    waits.sort_unstable();
    let median = waits.get(waits.len() / 2).copied().unwrap_or_default();
    println!(
        "{} kills ({} before, {} inside, {} after an exchange) of one of {count} ranks on {} GPUs, timeout {} ms{}: \
         {failed} failures; median wait {median:.0?}, longest {slowest_wait:.0?}, longest next mapping {slowest_mapping:.0?}; {per_kill:.0?} a kill, {mend:.0?} waited for new processes",
        kills,
        phases[0],
        phases[1],
        phases[2],
        options.gpus,
        options.timeout_ms,
        if options.abort { " and abort" } else { "" },
    );
    i32::from(failed > 0)
}
