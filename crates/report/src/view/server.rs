//! Which address gives what.
//!
//! | request | gives |
//! |---|---|
//! | `GET /` | the page |
//! | `GET /assignment` | cluster and confidence of every picture |
//! | `GET /map/<set>`, `/classes/<set>` | positions on the map; classes |
//! | `GET /members/<cluster>/<from>/<to>` | pictures of a cluster |
//! | `GET /picture/<place>` | what the view of a picture shows |
//! | `GET /thumbnail/<set>/<place>`, `/full/<set>/<place>` | a picture |
//! | `GET /export/clusters.csv`, `.json`, `.parquet` | the corrected clusters |
//! | `POST /edit`, JSON | makes a correction; 409 where the page shows an earlier state |
//!
//! What is under an address with `<set>`, which names the pictures by content, never changes: browsers keep it.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Error, Result};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use stage::Interrupt;
use tokio::time::sleep;

use crate::page;
use crate::view::access::{Access, AccessControl};
use crate::view::edits::EditError;
use crate::view::served::{SentPicture, ServedRun};

/// Threads that decode pictures and write pages; more requests wait.
const THREADS: usize = 4;

/// Most bytes of a request: an edit of 500,000 pictures.
const MOST_BYTES: usize = 4 << 20;

/// Serves until the interrupt is raised.
///
/// # Errors
///
/// The listener cannot be used, or the runtime cannot start.
pub fn serve(
    listener: TcpListener,
    access: AccessControl,
    served: Arc<ServedRun>,
    interrupt: &Interrupt,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(THREADS)
        .build()
        .context("starting the server")?;
    let result = runtime.block_on(async {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let server = axum::serve(listener, router(Arc::new(access), served));
        let server = server.with_graceful_shutdown(raised(interrupt.clone()));
        // A request that takes longer than this after the interrupt is dropped.
        let given_up = async {
            raised(interrupt.clone()).await;
            sleep(Duration::from_secs(2)).await;
        };
        tokio::select! {
            ended = server => ended,
            () = given_up => Ok(()),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    result.context("serving the page")
}

async fn raised(interrupt: Interrupt) {
    while !interrupt.is_raised() {
        sleep(Duration::from_millis(50)).await;
    }
}

fn router(access: Arc<AccessControl>, served: Arc<ServedRun>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/favicon.ico", get(async || StatusCode::NO_CONTENT)) // Browsers ask.
        .route("/assignment", get(assignment))
        .route("/map/{set}", get(map))
        .route("/classes/{set}", get(classes))
        .route("/members/{cluster}/{from}/{to}", get(members))
        .route("/picture/{place}", get(picture))
        .route("/thumbnail/{set}/{place}", get(thumbnail))
        .route("/full/{set}/{place}", get(full))
        .route("/export/{file}", get(export))
        .route("/edit", post(edit))
        .layer(DefaultBodyLimit::max(MOST_BYTES))
        .with_state(served)
        .layer(from_fn_with_state(access, guard))
}

/// Refuses whoever may not ask, and adds the headers of all answers.
async fn guard(State(access): State<Arc<AccessControl>>, request: Request, next: Next) -> Response {
    let mut response = match access.check(request.uri(), request.headers()) {
        Access::Granted => next.run(request).await,
        Access::ByToken => match access.cookie() {
            Ok(cookie) => {
                let to_page = (header::LOCATION, HeaderValue::from_static("/"));
                (StatusCode::SEE_OTHER, [to_page, (header::SET_COOKIE, cookie)]).into_response()
            }
            Err(error) => HttpError::from(error).into_response(),
        },
        Access::Denied(reason) => HttpError(StatusCode::FORBIDDEN, reason.into()).into_response(),
    };
    let headers = response.headers_mut();
    let policy = format!("{}; frame-ancestors 'none'", page::policy(true));
    for (name, value) in [
        ("content-security-policy", HeaderValue::from_str(&policy)),
        ("x-content-type-options", Ok(HeaderValue::from_static("nosniff"))),
        ("x-frame-options", Ok(HeaderValue::from_static("DENY"))),
        ("referrer-policy", Ok(HeaderValue::from_static("no-referrer"))),
        ("cross-origin-resource-policy", Ok(HeaderValue::from_static("same-origin"))),
        ("cross-origin-opener-policy", Ok(HeaderValue::from_static("same-origin"))),
    ] {
        headers.extend(value.ok().map(|value| (HeaderName::from_static(name), value)));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// Why a request has no other answer.
struct HttpError(StatusCode, String);

impl From<Error> for HttpError {
    fn from(error: Error) -> Self {
        tracing::warn!("{error:#}");
        Self(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}"))
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        (self.0, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], self.1).into_response()
    }
}

type HttpResult = Result<Response, HttpError>;

/// Runs work that takes long, or that waits for the disk, on a thread of its own; also where it panics, the server
/// goes on.
async fn on_thread<T: Send + 'static>(
    served: Arc<ServedRun>,
    work: impl FnOnce(&ServedRun) -> Result<T> + Send + 'static,
) -> Result<T, HttpError> {
    let done = tokio::task::spawn_blocking(move || work(&served)).await;
    Ok(done.context("a request ended in a fault of this program")??)
}

const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const BINARY: &str = "application/octet-stream";

fn typed(kind: &'static str, body: impl IntoResponse) -> Response {
    ([(header::CONTENT_TYPE, kind)], body).into_response()
}

/// An answer that browsers keep, under the right name of the pictures.
fn immutable(
    served: &ServedRun,
    set: &str,
    kind: &'static str,
    body: impl IntoResponse,
) -> HttpResult {
    if set != served.set {
        let message = "these pictures were served earlier; reload the page";
        return Err(HttpError(StatusCode::NOT_FOUND, message.into()));
    }
    let keep = [(header::CACHE_CONTROL, "private, max-age=31536000, immutable")];
    Ok((keep, typed(kind, body)).into_response())
}

type OfRun = State<Arc<ServedRun>>;

async fn page(State(served): OfRun) -> HttpResult {
    Ok(typed(HTML, on_thread(served, ServedRun::page).await?))
}

async fn assignment(State(served): OfRun) -> HttpResult {
    Ok(typed(BINARY, on_thread(served, |served| Ok(served.assignment())).await?))
}

async fn map(State(served): OfRun, Path(set): Path<String>) -> HttpResult {
    immutable(&served, &set, BINARY, served.map())
}

async fn classes(State(served): OfRun, Path(set): Path<String>) -> HttpResult {
    immutable(&served, &set, BINARY, served.classes())
}

async fn members(State(served): OfRun, Path(range): Path<(usize, usize, usize)>) -> HttpResult {
    let (cluster, from, to) = range;
    let found = on_thread(served, move |served| Ok(served.members(cluster, from, to))).await?;
    let found = found.map_err(|error| HttpError(StatusCode::NOT_FOUND, error.to_string()))?;
    Ok(typed(JSON, found.to_string()))
}

async fn picture(State(served): OfRun, Path(place): Path<u32>) -> HttpResult {
    let found = on_thread(served, move |served| Ok(served.picture(place))).await?;
    let found = found.map_err(|error| HttpError(StatusCode::NOT_FOUND, error.to_string()))?;
    Ok(typed(JSON, found.to_string()))
}

async fn thumbnail(State(served): OfRun, Path((set, place)): Path<(String, u32)>) -> HttpResult {
    sent(served, set, place, ServedRun::thumbnail).await
}

async fn full(State(served): OfRun, Path((set, place)): Path<(String, u32)>) -> HttpResult {
    sent(served, set, place, ServedRun::full).await
}

async fn export(State(served): OfRun, Path(file): Path<String>) -> HttpResult {
    let form = file.strip_prefix("clusters.").map(str::to_owned);
    let (form, kind) = match form.as_deref() {
        Some("csv") => ("csv", "text/csv; charset=utf-8"),
        Some("json") => ("json", JSON),
        Some("parquet") => ("parquet", BINARY),
        _ => return Err(HttpError(StatusCode::NOT_FOUND, "there is no such file".into())),
    };
    let table = on_thread(served, |served| served.table(form)).await?;
    let name = format!("attachment; filename=\"clusters.{form}\"");
    Ok(([(header::CONTENT_DISPOSITION, name)], typed(kind, table)).into_response())
}

async fn edit(State(served): OfRun, headers: HeaderMap, body: Bytes) -> HttpResult {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if kind != Some(JSON) {
        let message = "an edit is JSON: application/json";
        return Err(HttpError(StatusCode::UNSUPPORTED_MEDIA_TYPE, message.into()));
    }
    let request = serde_json::from_slice(&body);
    let request = request
        .map_err(|error| HttpError(StatusCode::BAD_REQUEST, format!("not an edit: {error}")))?;
    let made = on_thread(served, move |served| Ok(served.edit(request))).await?;
    made.map_err(|fault| match fault {
        EditError::Conflict(message) => HttpError(StatusCode::CONFLICT, message),
        EditError::Unusable(error) => {
            HttpError(StatusCode::UNPROCESSABLE_ENTITY, format!("Not saved: {error:#}"))
        }
        EditError::Machine(error) => {
            HttpError(StatusCode::INTERNAL_SERVER_ERROR, format!("Not saved: {error:#}"))
        }
    })?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn sent(
    served: Arc<ServedRun>,
    set: String,
    place: u32,
    read: fn(&ServedRun, u32) -> Result<SentPicture>,
) -> HttpResult {
    served.row(place).map_err(|error| HttpError(StatusCode::NOT_FOUND, error.to_string()))?;
    let (kind, bytes) = on_thread(served.clone(), move |served| read(served, place)).await?;
    immutable(&served, &set, kind, bytes.to_vec())
}
