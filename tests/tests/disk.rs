//! A checkpoint's file that is cut short under a running worker: that worker ends and says which file, the cluster
//! goes on, and no token changes.

use std::fs;
use std::time::Duration;

use conclave_tests::{Client, Healthy, Server, data};

#[test]
fn a_file_cut_short_in_use_ends_its_worker_alone() {
    let router = Server::router(&["--expected-workers", "2"]);
    let cluster = router.address("workers");
    let copy = tempfile::tempdir().expect("a folder");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(data::demo_model().join(file), copy.path().join(file)).expect("copy");
    }
    let worker = |model: &str| Server::worker(&cluster, &[model]);
    let mut doomed = worker(copy.path().to_str().expect("UTF-8"));
    let other = worker(data::demo_model().to_str().expect("UTF-8"));
    let gateway = Server::gateway(&[&router.address("gRPC")]);
    let client = Client::new(&gateway.address("HTTP"));
    let healthy = Healthy::start(&client, 4);

    let file = copy.path().join("model.safetensors");
    let open = fs::OpenOptions::new().write(true).open(&file).expect("open");
    open.set_len(4096).expect("cut short");
    let status = doomed.wait(Duration::from_secs(120));
    let output = doomed.output();
    assert_eq!(status.code(), Some(1), "{output}");
    let line = format!("{}: bytes of the file that are in use are gone", file.display());
    assert!(output.contains(&line), "{output}");
    healthy.finish();
    for process in [router, gateway, other] {
        assert_eq!(process.stop().code(), Some(0));
    }
}
