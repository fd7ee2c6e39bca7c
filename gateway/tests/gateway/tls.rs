//! TLS: handshake, protocols, reload, and clients that speak something else. The certificates in tests/data are
//! self-signed, for one.test and two.test, and for nothing else.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use conclave_gateway::{Gateway, GatewayConfig, TlsFiles};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::client::{Client, PATIENCE, read_to_end};
use crate::router::{hello, say, start_with};

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn files(name: &str) -> TlsFiles {
    TlsFiles {
        certificate: data(&format!("{name}.crt")),
        key: data(&format!("{name}.key")),
    }
}

/// A connection that trusts only the certificate of `name`.
async fn connect(
    client: &Client,
    name: &'static str,
    alpn: &[&[u8]],
) -> std::io::Result<TlsStream<tokio::net::TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(data(&format!("{name}.crt"))).unwrap())
        .unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    let server = ServerName::try_from(format!("{name}.test")).unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(server, client.connect().await)
        .await
}

async fn get_version(client: &Client, name: &'static str) -> std::io::Result<String> {
    let mut stream = connect(client, name, &[b"http/1.1"]).await?;
    stream
        .write_all(b"GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await?;
    let mut all = String::new();
    stream.read_to_string(&mut all).await?;
    Ok(all)
}

#[tokio::test]
async fn https_is_served_over_both_protocols() {
    let setup = start_with(|config| config.tls = Some(files("one")), |_| Ok(say(hello()))).await;
    assert!(
        get_version(&setup.client, "one")
            .await
            .unwrap()
            .contains("200 OK")
    );
    assert!(
        get_version(&setup.client, "two").await.is_err(),
        "another name must not be trusted"
    );
    let stream = connect(&setup.client, "one", &[b"h2"]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    tokio::spawn(connection);
    let body = http_body_util::Full::new(bytes::Bytes::from_static(b"{\"prompt\":\"a\"}"));
    let request = http::Request::post("https://one.test/v1/completions")
        .body(body)
        .unwrap();
    assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_client_that_speaks_no_tls_or_nothing_is_closed() {
    let setup = start_with(
        |config| {
            config.tls = Some(files("one"));
            config.limits.header_read_timeout = Duration::from_millis(300);
        },
        |_| Ok(say(hello())),
    )
    .await;
    for hello in ["GET /version HTTP/1.1\r\n\r\n", "", "\u{16}\u{3}\u{1}"] {
        let mut stream = setup.client.connect().await;
        stream.write_all(hello.as_bytes()).await.unwrap();
        let answer = read_to_end(&mut stream).await;
        assert!(!String::from_utf8_lossy(&answer).contains("200"), "{hello:?}");
    }
    assert!(get_version(&setup.client, "one").await.is_ok());
}

#[tokio::test]
async fn a_new_certificate_is_taken_and_half_of_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let here = TlsFiles {
        certificate: dir.path().join("crt"),
        key: dir.path().join("key"),
    };
    let put = |name: &str| {
        std::fs::copy(data(&format!("{name}.crt")), dir.path().join("crt")).unwrap();
        std::fs::copy(data(&format!("{name}.key")), dir.path().join("key")).unwrap();
    };
    put("one");
    let served = here.clone();
    let setup = start_with(move |config| config.tls = Some(served), |_| Ok(say(hello()))).await;
    assert!(get_version(&setup.client, "one").await.is_ok());
    std::fs::write(dir.path().join("key"), "nonsense").unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(get_version(&setup.client, "one").await.is_ok());
    put("two");
    tokio::time::timeout(PATIENCE, async {
        while get_version(&setup.client, "two").await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    assert!(get_version(&setup.client, "one").await.is_err());
}

#[tokio::test]
async fn bad_files_are_named_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    let (one, two) = (files("one"), files("two"));
    for (certificate, key, named) in [
        (dir.path().join("none.crt"), one.key.clone(), "none.crt"),
        (one.certificate.clone(), dir.path().join("none.key"), "none.key"),
        (empty.clone(), one.key.clone(), "empty.pem"),
        (one.certificate.clone(), empty, "empty.pem"),
        (one.certificate, two.key, "two.key"),
    ] {
        let mut config = GatewayConfig::new("127.0.0.1:0".parse().unwrap(), vec!["127.0.0.1:1".into()]);
        config.tls = Some(TlsFiles { certificate, key });
        let error = format!("{:#}", Gateway::bind(config).await.err().unwrap());
        assert!(error.contains(named), "{named}: {error}");
    }
}
