//! The one error type of the HTTP side, and OpenAI's shape of it:
//! `{"error":{"message","type","param","code"}}`.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

/// A refusal or failure, before it takes an API's shape.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    /// The request's field, as the client spelt it (`messages[0].content`).
    pub(crate) param: Option<String>,
    /// A word that programs may match.
    pub(crate) code: Option<String>,
    pub(crate) retry_after: Option<Duration>,
    /// Methods that the path does serve, with 405.
    pub(crate) allow: Option<Box<str>>,
    /// The request is longer than the context, by these numbers.
    pub(crate) too_long: Option<Box<TooLong>>,
}

/// Tokens of a request that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLong {
    pub(crate) prompt: u64,
    pub(crate) max_tokens: Option<u64>,
    pub(crate) limit: u64,
}

pub(crate) type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code: None,
            retry_after: None,
            allow: None,
            too_long: None,
        }
    }

    /// 400 about one field.
    pub(crate) fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::new(StatusCode::BAD_REQUEST, message)
        }
    }

    /// 400 about one field that this server does not serve.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::field(param, message).code("unsupported_parameter")
    }

    /// The first field of `asked`, each with what to do instead, that a request asks for and that this server does not serve.
    pub(crate) fn unserved<const N: usize>(asked: [(&'static str, bool, &'static str); N]) -> ApiResult<()> {
        match asked.into_iter().find(|(_, is_asked, _)| *is_asked) {
            Some((param, _, hint)) => Err(Self::unsupported(
                param,
                format!("{param} is not supported: {hint}"),
            )),
            None => Ok(()),
        }
    }

    pub(crate) fn code(self, code: impl Into<String>) -> Self {
        Self {
            code: Some(code.into()),
            ..self
        }
    }

    pub(crate) fn retry_after(self, delay: Duration) -> Self {
        Self {
            retry_after: Some(delay),
            ..self
        }
    }

    /// Puts the router's name of the field into the client's words: in `param`, and in the message, which begins with it.
    pub(crate) fn with_field(mut self, words: impl FnOnce(&str) -> String) -> Self {
        if let Some(proto) = self.param.take() {
            let field = words(&proto);
            self.message = self.message.replacen(&proto, &field, 1);
            self.param = Some(field);
        }
        self
    }

    /// OpenAI's word for the class of error.
    pub(crate) fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            408 | 504 => "timeout_error",
            429 => "rate_limit_error",
            status if status < 500 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// The JSON text of this error in OpenAI's shape.
    pub(crate) fn to_openai(&self) -> String {
        let envelope = Envelope {
            error: Inner {
                message: &self.message,
                kind: self.kind(),
                param: self.param.as_deref(),
                code: self.code.as_deref(),
            },
        };
        serde_json::to_string(&envelope).unwrap_or_else(|_| String::from("{\"error\":{}}"))
    }

    /// `body` as this error's answer: status, JSON, and the headers that go with it.
    pub(crate) fn respond_with(self, body: String) -> Response {
        let mut response = (self.status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(delay) = self.retry_after {
            // Whole seconds, rounded up: zero would ask for a retry at once.
            let seconds = delay.as_secs() + u64::from(delay.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if let Some(allow) = self.allow.and_then(|methods| methods.parse().ok()) {
            headers.insert(header::ALLOW, allow);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = self.to_openai();
        self.respond_with(body)
    }
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}
