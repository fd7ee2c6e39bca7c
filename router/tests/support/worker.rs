//! The scripted worker.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use conclave_proto::cluster::v1 as pb;
use conclave_proto::cluster::v1::cluster_client::ClusterClient;
use conclave_proto::cluster::v1::from_worker::Message as Said;
use conclave_proto::cluster::v1::to_worker::Message as Heard;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{EOS, PATIENCE, TOKEN, VOCAB};

/// The token at `position` after `last`: never eos, and the whole vocabulary otherwise.
pub fn next_token(last: u32, position: u32) -> u32 {
    3 + (last
        .wrapping_mul(31)
        .wrapping_add(position.wrapping_mul(17))
        .wrapping_add(5))
        % (VOCAB - 3)
}

/// How a worker behaves.
#[derive(Clone)]
pub struct Script {
    pub hello: pb::Hello,
    /// Time one step takes.
    pub step: Duration,
    /// Falls silent after so many steps, with its connection open.
    pub silent_after: Option<u64>,
    /// Claims this token from then on.
    pub bad_token_after: Option<(u64, u32)>,
    /// Says this after every prompt, then eos.
    pub forced: Option<Arc<[u32]>>,
    /// Draws eos at this position.
    pub eos_at: Option<u32>,
    /// The slot's sampling fails at this position.
    pub error_at: Option<u32>,
    /// And says that its own request forbids every token.
    pub unsatisfiable: bool,
}

impl Script {
    pub fn new(id: &str) -> Script {
        Script {
            hello: pb::Hello {
                worker_id: id.into(),
                version: env!("CARGO_PKG_VERSION").into(),
                device: "cpu".into(),
                device_name: "script".into(),
                memory_bytes: 1 << 30,
                peer_address: "127.0.0.1:1".into(),
                checkpoint_id: "tiny".into(),
                cluster_token: TOKEN.into(),
                kv_pages: 1024,
                page_tokens: 16,
                threads: 1,
                transports: vec!["local".into(), "tcp".into()],
                expert_bytes_capacity: 0,
                rank: None,
                kv_cache_dtype: "bf16".into(),
                max_slots: 8,
                max_batched_tokens: 256,
                max_model_len: u32::MAX,
                host_id: "host".into(),
                device_uuid: String::new(),
            },
            step: Duration::ZERO,
            silent_after: None,
            bad_token_after: None,
            forced: None,
            eos_at: None,
            error_at: None,
            unsatisfiable: false,
        }
    }

    pub fn with(mut self, change: impl FnOnce(&mut pb::Hello)) -> Script {
        change(&mut self.hello);
        self
    }

    pub fn step(mut self, step: Duration) -> Script {
        self.step = step;
        self
    }
}

/// What a test can see of a worker.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub steps: u64,
    pub epochs: u64,
    /// Slots in use.
    pub slots: usize,
    pub trace_parents: Vec<String>,
    pub shutdown: bool,
    /// Why the stream ended.
    pub ended: Option<Result<(), (tonic::Code, String)>>,
    pub peers: usize,
    pub transport: String,
    pub rank: u32,
    pub communicator_ids: Vec<pb::CommunicatorId>,
}

pub struct ScriptedWorker {
    pub seen: watch::Receiver<Seen>,
    task: tokio::task::JoinHandle<()>,
}

impl ScriptedWorker {
    /// Says Hello; an error is the router's refusal.
    pub async fn attach(address: String, script: Script) -> Result<ScriptedWorker, Status> {
        let (say, heard) = connect(address, script.hello.clone()).await?;
        let (seen_out, seen) = watch::channel(Seen::default());
        let task = tokio::spawn(run(script, say, heard, seen_out));
        Ok(ScriptedWorker { seen, task })
    }

    /// Dies without a word.
    pub fn kill(self) {
        self.task.abort();
    }

    pub async fn until(&mut self, wanted: impl FnMut(&Seen) -> bool) -> Seen {
        let waited = tokio::time::timeout(PATIENCE, self.seen.wait_for(wanted)).await;
        waited.unwrap().unwrap().clone()
    }
}

/// The two ends of an attached stream, after Welcome.
pub async fn connect(
    address: String,
    hello: pb::Hello,
) -> Result<(mpsc::Sender<pb::FromWorker>, Streaming<pb::ToWorker>), Status> {
    let client = ClusterClient::connect(address).await.unwrap();
    let mut client = client.max_decoding_message_size(128 << 20);
    let (say, said) = mpsc::channel(64);
    say.send(message(Said::Hello(hello))).await.unwrap();
    let mut heard = client.attach(ReceiverStream::new(said)).await?.into_inner();
    let welcome = heard.message().await?.unwrap();
    assert!(matches!(welcome.message, Some(Heard::Welcome(_))), "{welcome:?}");
    Ok((say, heard))
}

pub fn message(message: Said) -> pb::FromWorker {
    pb::FromWorker {
        message: Some(message),
    }
}

struct Slot {
    last: u32,
    prompt: u32,
    logprobs: Option<u32>,
    length: u32,
}

async fn run(
    script: Script,
    say: mpsc::Sender<pb::FromWorker>,
    mut heard: Streaming<pb::ToWorker>,
    seen: watch::Sender<Seen>,
) {
    let mut slots: HashMap<u32, Slot> = HashMap::new();
    let mut beat = tokio::time::interval(Duration::from_millis(100));
    let mut steps = 0;
    loop {
        let silent = script.silent_after.is_some_and(|after| steps >= after);
        let next = tokio::select! {
            next = heard.message() => next,
            _ = beat.tick() => {
                if !silent {
                    let heartbeat = pb::Heartbeat { epoch: 0, last_step: steps };
                    let _ = say.send(message(Said::Heartbeat(heartbeat))).await;
                }
                continue;
            }
        };
        let heard = match next {
            Ok(Some(heard)) => heard.message.unwrap(),
            Ok(None) => return seen.send_modify(|seen| seen.ended = Some(Ok(()))),
            Err(status) => {
                let why = (status.code(), status.message().to_owned());
                return seen.send_modify(|seen| seen.ended = Some(Err(why)));
            }
        };
        if silent {
            continue;
        }
        match heard {
            Heard::EpochStart(start) => {
                slots.clear();
                seen.send_modify(|seen| {
                    seen.epochs += 1;
                    seen.peers = start.peers.len();
                    seen.transport = start.transport.clone();
                    seen.rank = start.rank;
                });
                assert_eq!(start.peer_secret.len(), 32);
                let ready = pb::EpochReady {
                    epoch: start.epoch,
                    ..Default::default()
                };
                let _ = say.send(message(Said::EpochReady(ready))).await;
            }
            Heard::Step(step) => {
                steps += 1;
                if !script.step.is_zero() {
                    tokio::time::sleep(script.step).await;
                }
                let result = execute(&script, &mut slots, &step, steps);
                let _ = say.send(message(Said::StepResult(result))).await;
                seen.send_modify(|seen| {
                    seen.steps = steps;
                    seen.slots = slots.len();
                    seen.trace_parents.extend(step.trace_parents);
                });
            }
            Heard::CommunicatorId(id) => seen.send_modify(|seen| seen.communicator_ids.push(id)),
            Heard::Shutdown(_) => seen.send_modify(|seen| seen.shutdown = true),
            Heard::EpochAbort(_) => slots.clear(),
            Heard::Welcome(_) => panic!("a second Welcome"),
        }
    }
}

fn execute(script: &Script, slots: &mut HashMap<u32, Slot>, step: &pb::Step, steps: u64) -> pb::StepResult {
    for slot in &step.end_slots {
        assert!(slots.remove(slot).is_some(), "an empty slot ended");
    }
    for start in &step.start_slots {
        let slot = Slot {
            last: 0,
            prompt: start.prompt_tokens,
            logprobs: start.sampling.as_ref().unwrap().logprobs,
            length: start.cached_tokens,
        };
        assert!(slots.insert(start.slot, slot).is_none(), "a slot started twice");
    }
    let mut result = pb::StepResult {
        epoch: step.epoch,
        step: step.step,
        busy_us: 100,
        idle_us: 10,
        ..Default::default()
    };
    let tokens: usize = step.runs.iter().map(|run| run.tokens.len().max(1)).sum();
    assert!(step.group_tokens as usize >= tokens, "the largest of all ranks");
    for run in &step.runs {
        let slot = slots.get_mut(&run.slot).expect("a run of an empty slot");
        assert_eq!(run.position, slot.length, "runs follow each other");
        slot.last = run.tokens.last().copied().unwrap_or(slot.last);
        slot.length += u32::try_from(run.tokens.len().max(1)).unwrap();
        if run.prompt_logprobs.is_some() {
            let next = run.tokens.len() - usize::from(run.next_prompt_token.is_none());
            result.prompt_logprobs.push(pb::PromptLogprobs {
                slot: run.slot,
                position: run.position + 1,
                entries: vec![logprobs(-0.5, run.prompt_logprobs); next],
            });
        }
        if run.sample {
            slot.last = match script.eos_at {
                Some(position) if position == slot.length => EOS,
                _ => match &script.forced {
                    Some(tokens) => *tokens.get((slot.length - slot.prompt) as usize).unwrap_or(&EOS),
                    None => next_token(slot.last, slot.length),
                },
            };
            let failed = script.error_at == Some(slot.length);
            let token = match script.bad_token_after {
                Some((after, token)) if steps > after => token,
                _ => slot.last,
            };
            result.samples.push(pb::Sample {
                slot: run.slot,
                token,
                logprobs: slot.logprobs.map(|n| logprobs(-0.25, Some(n))),
                error: if failed {
                    "NaN in its logits".into()
                } else {
                    String::new()
                },
                unsatisfiable: failed && script.unsatisfiable,
            });
        }
    }
    result
}

fn logprobs(sampled: f32, top: Option<u32>) -> pb::Logprobs {
    let top = top.unwrap_or(0);
    pb::Logprobs {
        sampled,
        sampled_rank: 1,
        top_tokens: (VOCAB - top..VOCAB).collect(),
        top_logprobs: (0..top).map(|i| -(i as f32)).collect(),
    }
}
