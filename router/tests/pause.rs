//! A machine that stands still: router and worker of this process do, as they would in a paused virtual machine. A file of
//! its own, because nothing else may run in the process.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::process::Command;
use std::time::Duration;

use support::{Answer, Cluster, Script, config, expected, request};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_of_the_whole_machine_loses_no_worker() {
    let mut usual = config();
    usual.heartbeat_timeout = Duration::from_secs(1);
    let (cluster, _worker) =
        Cluster::with_worker(usual, Script::new("a").step(Duration::from_millis(5))).await;
    let reading = tokio::spawn(Answer::read(cluster.generate(request(&[3], 50)).await.unwrap()));
    for seconds in ["0.7", "1.1", "1.3", "2"] {
        let pause = format!("kill -STOP $PPID; sleep {seconds}; kill -CONT $PPID");
        let paused = Command::new("sh").args(["-c", &pause]).status();
        assert!(paused.unwrap().success());
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(cluster.metric("conclave:workers_lost_total").await, 0.0);
    assert_eq!(reading.await.unwrap().tokens, [expected(&[3], 50)]);
}
