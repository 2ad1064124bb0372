//! The OpenAPI document.

use utoipa::OpenApi;

use super::{checkpoints, hosts, networks, peer, upgrade, vms};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "rametd",
        description = "Forks running virtual machines. One daemon a host; the same API on its Unix socket and, by mutual TLS, between hosts."
    ),
    paths(
        networks::create,
        networks::list,
        networks::remove,
        vms::run,
        vms::list,
        vms::show,
        vms::remove,
        vms::stop,
        vms::stats,
        vms::ping,
        vms::time,
        vms::put_file,
        vms::get_file,
        upgrade::exec,
        upgrade::console,
        upgrade::lease,
        checkpoints::create,
        checkpoints::fork,
        checkpoints::list,
        checkpoints::show,
        checkpoints::wait,
        checkpoints::descriptor,
        checkpoints::colors,
        checkpoints::color_map,
        checkpoints::changed,
        checkpoints::remove,
        checkpoints::clone,
        hosts::info,
        hosts::doctor,
        hosts::images,
        hosts::stats,
        hosts::metrics,
        hosts::openapi,
        hosts::pool,
        hosts::warm,
        hosts::shutdown,
        hosts::list,
        hosts::init,
        hosts::token,
        hosts::join,
        hosts::drain,
        peer::join,
        peer::hosts,
        peer::clones,
        peer::pool,
        peer::members,
        peer::boot,
        peer::tunnel,
        peer::image,
        peer::image_drop,
        peer::disk_sources,
        peer::abort,
        peer::commit,
    ),
    components(schemas(ramet_client::api::PeerCloneRequest))
)]
struct Document;

/// The document as JSON, the same for the same source.
#[must_use]
pub fn document() -> String {
    Document::openapi().to_pretty_json().map(|json| json + "\n").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checked_in_document_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");
        if std::env::var_os("RAMET_UPDATE_OPENAPI").is_some() {
            std::fs::write(path, document()).unwrap();
        }
        let checked_in = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            checked_in == document(),
            "docs/openapi.json is out of date: run `cargo run -p ramet-host --bin rametd -- --print-openapi > docs/openapi.json`"
        );
    }

    /// Every route is documented: the router's source names no path that the document lacks.
    #[test]
    fn every_route_is_in_the_document() {
        let document: serde_json::Value = serde_json::from_str(&document()).unwrap();
        let source = include_str!("mod.rs");
        let routes: Vec<_> =
            source.lines().filter_map(|l| l.trim().strip_prefix(".route(\"")?.split('"').next()).collect();
        assert!(routes.len() > 30, "{routes:?}");
        for route in routes {
            assert!(!document["paths"][route].is_null(), "{route} is not documented");
        }
    }
}
