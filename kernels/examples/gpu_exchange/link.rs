//! How the ranks of a check meet: each gives a line and gets everybody's. Threads meet in memory; processes over their
//! standard input and output, which the parent joins.

use std::io::{BufRead, BufReader, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};

use crate::Options;
use crate::rank::{Rank, Work};

pub trait Link {
    /// Everybody's line, by rank.
    fn gather(&mut self, line: &str) -> Vec<String>;
}

struct Round {
    number: u64,
    lines: Vec<Option<String>>,
    result: Vec<String>,
    /// A rank has failed and will not come any more.
    broken: bool,
}

/// A meeting place of threads.
struct Place {
    round: Mutex<Round>,
    done: Condvar,
}

struct ThreadLink {
    rank: usize,
    place: Arc<Place>,
}

impl Link for ThreadLink {
    fn gather(&mut self, line: &str) -> Vec<String> {
        let mut round = self.place.round.lock().unwrap();
        let number = round.number;
        round.lines[self.rank] = Some(line.to_owned());
        if round.lines.iter().all(Option::is_some) {
            round.result = round.lines.iter_mut().map(|line| line.take().unwrap()).collect();
            round.number += 1;
            self.place.done.notify_all();
            return round.result.clone();
        }
        let round = self
            .place
            .done
            .wait_while(round, |round| round.number == number && !round.broken)
            .unwrap();
        let came = round.number != number;
        let result = round.result.clone();
        drop(round);
        assert!(came, "another rank has failed");
        result
    }
}

/// Runs all ranks as threads; how many checks failed.
pub fn threads(options: &Options, ranks: usize, work: Work) -> usize {
    let place = Arc::new(Place {
        round: Mutex::new(Round {
            number: 0,
            lines: vec![None; ranks],
            result: Vec::new(),
            broken: false,
        }),
        done: Condvar::new(),
    });
    let handles: Vec<_> = (0..ranks)
        .map(|rank| {
            let (place, options) = (place.clone(), options.clone());
            std::thread::spawn(move || {
                let link = ThreadLink {
                    rank,
                    place: Arc::clone(&place),
                };
                let run = || work(&mut Rank::new(&options, rank, ranks, Box::new(link)));
                // The others would wait for it, and its library's threads must end before the process does: on its way out of the
                // panic the rank leaves its epoch, and so does everybody who waits for it.
                catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
                    place.round.lock().unwrap().broken = true;
                    place.done.notify_all();
                    1
                })
            })
        })
        .collect();
    handles.into_iter().map(|handle| handle.join().unwrap_or(1)).sum()
}

struct ChildLink;

impl Link for ChildLink {
    fn gather(&mut self, line: &str) -> Vec<String> {
        println!("> {line}");
        std::io::stdout().flush().unwrap();
        let mut answer = String::new();
        if std::io::stdin().read_line(&mut answer).unwrap_or(0) == 0 {
            std::process::exit(2);
        }
        answer.trim_end().split('\t').map(str::to_owned).collect()
    }
}

/// One rank of several processes.
pub fn child(options: &Options, work: Work) -> i32 {
    let rank = options.child.unwrap();
    let failed = work(&mut Rank::new(
        options,
        rank,
        options.ranks[0],
        Box::new(ChildLink),
    ));
    println!("= {failed}");
    i32::from(failed > 0)
}

/// This program again, as a child.
pub fn spawn(options: &Options, ranks: usize, rank: usize) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([&options.mode, "--ranks", &ranks.to_string()])
        .args(["--gpus", &options.gpus.to_string(), "--child", &rank.to_string()])
        .args([
            "--timeout-ms",
            &options.timeout_ms.to_string(),
            "--data",
            &options.data,
        ]);
    if options.nccl {
        command.args(["--transport", "nccl"]);
    }
    if options.trace {
        command.arg("--trace");
    }
    command.args([
        "--skew-us",
        &options.skew_us.to_string(),
        "--times",
        &options.times.to_string(),
    ]);
    if !options.only.is_empty() {
        command.args(["--only", &options.only]);
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs all ranks as processes; how many checks failed.
pub fn processes(options: &Options, ranks: usize) -> usize {
    let mut children: Vec<Child> = (0..ranks).map(|rank| spawn(options, ranks, rank)).collect();
    let mut outputs: Vec<_> = children
        .iter_mut()
        .map(|child| BufReader::new(child.stdout.take().unwrap()).lines())
        .collect();
    let mut failed = 0;
    let mut ended = 0;
    'rounds: while ended < ranks {
        let mut round = Vec::new();
        for output in &mut outputs {
            loop {
                let Some(Ok(line)) = output.next() else {
                    println!("FAILED  a rank's process ended");
                    failed += 1;
                    break 'rounds;
                };
                if let Some(line) = line.strip_prefix("> ") {
                    round.push(line.to_owned());
                    break;
                }
                if let Some(count) = line.strip_prefix("= ") {
                    failed += count.parse::<usize>().unwrap();
                    ended += 1;
                    break;
                }
                println!("{line}");
            }
        }
        let joined = round.join("\t") + "\n";
        for child in &mut children {
            let input = child.stdin.as_mut().unwrap();
            // A rank that has ended does not listen.
            let _ = input.write_all(joined.as_bytes()).and_then(|()| input.flush());
        }
    }
    for child in &mut children {
        drop(child.stdin.take());
        let _ = child.kill();
        let _ = child.wait();
    }
    failed
}
