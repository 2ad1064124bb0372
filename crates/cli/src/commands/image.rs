//! Guest images: build, ls, rm.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use ramet_image::{BuildOptions, Image, Manifest, Progress, Stage, parse_add};
use serde::Serialize;

use crate::{
    args::{ImageBuildArgs, ImageCommand, program_dir},
    context::Context,
    output::{self, Rows},
};

pub(crate) async fn run(context: &Context, command: &ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Build(args) => build(context, args).await,
        ImageCommand::Ls(dir) => {
            let manifests = dir.store()?.list()?;
            context.out.show(&manifests, |all| table(all))
        }
        ImageCommand::Rm(args) => {
            let store = args.dir.store()?;
            super::each(&args.names, |name| {
                let removed = store.remove(name).map_err(anyhow::Error::from);
                async move { removed }
            })
            .await
        }
    }
}

/// What `ramet image build --json` prints.
#[derive(Debug, Serialize)]
struct Built {
    manifest: Manifest,
    dir: PathBuf,
    bytes: u64,
}

async fn build(context: &Context, args: &ImageBuildArgs) -> Result<()> {
    let store = args.dir.store()?;
    let work: Box<dyn FnOnce() -> Result<Image> + Send> = match &args.tiny {
        Some(binary) => {
            if args.name != ramet_image::TINY_NAME {
                bail!("The test guest's image is always named '{}'", ramet_image::TINY_NAME);
            }
            let binary = binary.clone();
            Box::new(move || Ok(store.add_tiny(&binary)?))
        }
        None => {
            let options = BuildOptions {
                name: args.name.clone(),
                packages: args.packages.clone(),
                suite: args.suite.clone(),
                add: args.add.iter().map(|text| parse_add(text)).collect::<Result<_, _>>()?,
                agent: agent(args)?,
                replace: args.replace,
            };
            let disk = args.debian.then_some(args.size);
            Box::new(move || {
                let bar = Bar::new();
                let mut progress = |progress| bar.set(progress);
                Ok(match disk {
                    Some(size) => store.build_debian(&options, size.bytes(), &mut progress)?,
                    None => store.build(&options, &mut progress)?,
                })
            })
        }
    };
    let image = tokio::task::spawn_blocking(work).await.context("Building broke")??;
    let built = Built { bytes: image.size(), dir: image.dir, manifest: image.manifest };
    context.out.show(&built, |b| {
        let disk = b.manifest.disk.as_ref();
        format!(
            "Image {} in {}: {}, kernel {}{}",
            b.manifest.name,
            b.dir.display(),
            output::bytes(b.bytes),
            b.manifest.kernel_version,
            disk.map_or_else(String::new, |disk| format!(", disk {} ({})", output::bytes(disk.size), disk.xxh3_128))
        )
    })
}

fn agent(args: &ImageBuildArgs) -> Result<PathBuf> {
    if let Some(agent) = &args.agent {
        return Ok(agent.clone());
    }
    // In a build directory `ramet-agent` is one that needs libraries of this machine.
    let dir = program_dir()?;
    let linked = dir.join("ramet-agent-static");
    Ok(if linked.exists() { linked } else { dir.join("ramet-agent") })
}

/// A bar on a terminal, a line for each stage elsewhere.
struct Bar {
    bar: ProgressBar,
    last: std::cell::Cell<Option<Stage>>,
}

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::new(1000);
        if let Ok(style) = ProgressStyle::with_template("{msg:34} {wide_bar} {percent:>3}%") {
            bar.set_style(style);
        }
        Self { bar, last: std::cell::Cell::new(None) }
    }

    fn set(&self, progress: Progress) {
        if self.last.replace(Some(progress.stage)) != Some(progress.stage) {
            self.bar.set_message(progress.stage.to_string());
            if self.bar.is_hidden() {
                output::note(&format!("{}...", progress.stage));
            }
        }
        self.bar.set_position((progress.fraction.clamp(0.0, 1.0) * 1000.0) as u64);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn table(manifests: &[Manifest]) -> String {
    let mut rows = Rows::new(&["NAME", "GUEST", ">SIZE", ">DISK", "KERNEL", "SUITE", "AGE", "PACKAGES"]);
    for manifest in manifests {
        rows.add([
            manifest.name.clone(),
            manifest.kind.to_string(),
            output::bytes(manifest.stored() >> 10 << 10),
            manifest.disk.as_ref().map_or_else(String::new, |disk| {
                format!("{} of {}", output::bytes(disk.stored >> 10 << 10), output::bytes(disk.size))
            }),
            manifest.kernel_version.clone(),
            manifest.suite.clone().unwrap_or_default(),
            output::age(manifest.created * 1000),
            manifest.packages.join(","),
        ]);
    }
    rows.text()
}
