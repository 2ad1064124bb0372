//! What memory is used for: `ramet colors`.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use ramet_client::{
    Client,
    api::{ChangedPages, CheckpointColors, CheckpointRequest, ErrorCode},
};
use ramet_color::{ColorMap, Diff, FileSummary, Method, ProcessSummary, Summary, draw};
use ramet_memory::{ByteSize, PageCount, PageIndex, PageRun, PageSet};
use serde::Serialize;

use crate::{
    args::ColorsArgs,
    context::Context,
    output::{self, Rows},
};

/// A checkpoint that is looked at, and whether it was made for that.
struct Target {
    id: String,
    temporary: bool,
}

/// `--diff --json`.
#[derive(Debug, Serialize)]
struct DiffOutput {
    checkpoint: String,
    since: String,
    diff: Diff,
}

pub(crate) async fn run(context: &Context, args: &ColorsArgs) -> Result<()> {
    let client = context.client()?;
    let target = find(&client, &args.what).await?;
    let work = look(context, &client, args, &target.id);
    let result = tokio::select! {
        result = work => result,
        // A checkpoint that was made only for this is not to stay.
        _ = tokio::signal::ctrl_c(), if target.temporary => {
            client.remove_checkpoint(&target.id).await?;
            std::process::exit(130);
        }
    };
    if target.temporary {
        client.remove_checkpoint(&target.id).await?;
    }
    result
}

/// A checkpoint of that id, or else one of the VM of that name, made for the moment.
async fn find(client: &Client, what: &str) -> Result<Target> {
    match client.checkpoint_info(what).await {
        Ok(info) => return Ok(Target { id: info.id.to_string(), temporary: false }),
        Err(err) if err.code() != Some(ErrorCode::NotFound) => return Err(err.into()),
        Err(_) => {}
    }
    let request = CheckpointRequest { note: Some("for `ramet colors`".to_owned()), wait: false, ..Default::default() };
    match client.checkpoint(what, &request).await {
        Ok(made) => {
            output::note(&format!("{} stood still for {}", made.checkpoint.vm_name, output::us(made.pause_us)));
            Ok(Target { id: made.checkpoint.id.to_string(), temporary: true })
        }
        Err(err) if err.code() == Some(ErrorCode::NotFound) => {
            bail!(
                "There is no checkpoint and no VM '{what}' on this host; see `ramet checkpoint ls` and `ramet ps --all-hosts`"
            )
        }
        Err(err) => Err(err.into()),
    }
}

async fn look(context: &Context, client: &Client, args: &ColorsArgs, id: &str) -> Result<()> {
    let colors = client.colors(id, Some(args.largest)).await?;
    let Some(since) = &args.diff else {
        let map = if args.png.is_some() || args.svg.is_some() { Some(map(client, &colors).await?) } else { None };
        if let Some(map) = &map {
            pictures(args, map, &title(&colors), None)?;
        }
        return context.out.show(&colors, text);
    };
    let old = client.colors(since, Some(0)).await?;
    let changed = client.changed_pages(id, since).await?;
    let changed_pages = set(&changed)?;
    let (new_map, old_map) = (map(client, &colors).await?, map(client, &old).await?);
    let diff = Diff::of(&old_map, &new_map, &changed_pages)?;
    let heading = format!("{}, changed since {}", title(&colors), output::short(old.checkpoint));
    pictures(args, &new_map, &heading, Some(&changed_pages))?;
    let shown = DiffOutput { checkpoint: colors.checkpoint.to_string(), since: old.checkpoint.to_string(), diff };
    context.out.show(&shown, |shown| diff_text(shown, args.largest))
}

async fn map(client: &Client, colors: &CheckpointColors) -> Result<ColorMap> {
    let bytes = client.color_map(&colors.checkpoint.to_string()).await?;
    ColorMap::decode(&bytes, PageCount(colors.summary.pages)).context("The daemon's color map can't be used")
}

fn set(changed: &ChangedPages) -> Result<PageSet> {
    const LARGEST: u64 = 1 << 28;
    if changed.pages > LARGEST {
        bail!("The daemon tells of {} pages, more than any guest has", changed.pages);
    }
    let mut set = PageSet::new(PageCount(changed.pages));
    for &[start, len] in &changed.runs {
        set.insert_run(PageRun { start: PageIndex(start), len });
    }
    Ok(set)
}

fn title(colors: &CheckpointColors) -> String {
    let kernel = colors.summary.kernel.as_ref().map_or_else(String::new, |k| format!(", Linux {}", k.release));
    let memory = ByteSize(colors.summary.memory);
    format!("checkpoint {} of {}, {memory}{kernel}", output::short(colors.checkpoint), colors.vm_name)
}

fn pictures(args: &ColorsArgs, map: &ColorMap, title: &str, changed: Option<&PageSet>) -> Result<()> {
    let options = draw::Options { title, changed };
    let write = |path: &Path, bytes: &[u8]| {
        std::fs::write(path, bytes).with_context(|| format!("Failed to write {}", path.display()))
    };
    if let Some(path) = &args.png {
        write(path, &draw::png(map, &options)?)?;
    }
    if let Some(path) = &args.svg {
        write(path, draw::svg(map, &options).as_bytes())?;
    }
    Ok(())
}

fn text(colors: &CheckpointColors) -> String {
    let summary = &colors.summary;
    let mut text = facts(colors);
    let mut rows = Rows::new(&["COLOR", ">PAGES", ">SIZE", ">SHARE"]);
    for color in &summary.colors {
        rows.add([
            color.color.name().to_owned(),
            color.pages.to_string(),
            mib(color.pages),
            share(color.pages, summary.pages),
        ]);
    }
    text.push_str(&format!("\n{}", rows.text()));
    if !summary.files.is_empty() {
        text.push_str(&format!("\n{}", files(&summary.files, summary.files_total)));
    }
    if !summary.processes.is_empty() {
        text.push_str(&format!("\n{}", processes(&summary.processes, summary.processes_total)));
    }
    if !summary.caches.is_empty() {
        let mut rows = Rows::new(&[&format!("SLAB CACHE (of {})", summary.caches_total), ">PAGES", ">SIZE"]);
        for cache in &summary.caches {
            rows.add([cache.name.clone(), cache.pages.to_string(), mib(cache.pages)]);
        }
        text.push_str(&format!("\n{}", rows.text()));
    }
    text
}

fn facts(colors: &CheckpointColors) -> String {
    let Summary { kernel, method, trouble, poisons_free, memory, .. } = &colors.summary;
    let mut pairs = vec![
        ("checkpoint", format!("{} of {} on {}", output::short(colors.checkpoint), colors.vm_name, colors.host)),
        ("memory", ByteSize(*memory).to_string()),
        ("told by", method.name().to_owned()),
        ("map", output::bytes(colors.map_bytes)),
    ];
    if let Some(kernel) = kernel {
        let build = kernel.build.get(..12).unwrap_or(&kernel.build);
        pairs.push((
            "kernel",
            format!("Linux {} (build {build}, {} levels of page tables)", kernel.release, kernel.levels),
        ));
    }
    if !trouble.is_empty() {
        pairs.push(("trouble", trouble.clone()));
    }
    if *method != Method::Full {
        pairs.push(("note", "no page is called free, and not all is told apart".to_owned()));
    }
    if *poisons_free {
        pairs.push(("note", "the guest checks what is in its free pages: they are kept as they are".to_owned()));
    }
    output::fields(&pairs)
}

fn files(files: &[FileSummary], total: u64) -> String {
    let mut rows = Rows::new(&[&format!("FILE (of {total})"), "FILE SYSTEM", ">INODE", ">PAGES", ">SIZE", ">CODE"]);
    for file in files {
        let name = if file.path.is_empty() { "(no name)".to_owned() } else { file.path.clone() };
        let system = if file.superblock == file.file_system {
            file.superblock.clone()
        } else {
            format!("{} {}", file.file_system, file.superblock)
        };
        rows.add([
            name,
            system.trim().to_owned(),
            file.inode.to_string(),
            file.pages.to_string(),
            mib(file.pages),
            file.executable_pages.to_string(),
        ]);
    }
    rows.text()
}

fn processes(processes: &[ProcessSummary], total: u64) -> String {
    let mut rows = Rows::new(&[&format!("PROCESS (of {total})"), ">PID", ">PAGES", ">SIZE", ">OWN", ">FILES"]);
    for process in processes {
        rows.add([
            command(&process.command, process.root),
            process.pid.to_string(),
            process.pages.to_string(),
            mib(process.pages),
            mib(process.data_pages),
            mib(process.cache_pages),
        ]);
    }
    rows.text()
}

fn command(command: &str, root: u64) -> String {
    if command.is_empty() { format!("(page tables at {root:#x})") } else { command.to_owned() }
}

fn diff_text(shown: &DiffOutput, largest: usize) -> String {
    let diff = &shown.diff;
    let mut text = output::fields(&[
        ("checkpoint", shown.checkpoint.clone()),
        ("since", shown.since.clone()),
        ("changed", format!("{} pages, {}", diff.changed_pages, mib(diff.changed_pages))),
        ("another color", format!("{} pages", diff.recolored_pages)),
    ]);
    let mut rows = Rows::new(&["COLOR", ">PAGES", ">CHANGED", ">SIZE", ">BECAME", ">WAS"]);
    for color in &diff.colors {
        rows.add([
            color.color.name().to_owned(),
            color.pages.to_string(),
            color.changed_pages.to_string(),
            mib(color.changed_pages),
            color.gained_pages.to_string(),
            color.lost_pages.to_string(),
        ]);
    }
    text.push_str(&format!("\n{}", rows.text()));
    if !diff.transitions.is_empty() {
        let mut rows = Rows::new(&["FROM", "TO", ">PAGES"]);
        for t in diff.transitions.iter().take(largest) {
            rows.add([t.from.name().to_owned(), t.to.name().to_owned(), t.pages.to_string()]);
        }
        text.push_str(&format!("\n{}", rows.text()));
    }
    if !diff.files.is_empty() {
        let mut rows = Rows::new(&[&format!("FILE (of {})", diff.files_total), ">INODE", ">CHANGED"]);
        for file in diff.files.iter().take(largest) {
            rows.add([file.path.clone(), file.inode.to_string(), file.changed_pages.to_string()]);
        }
        text.push_str(&format!("\n{}", rows.text()));
    }
    if !diff.processes.is_empty() {
        let mut rows = Rows::new(&[&format!("PROCESS (of {})", diff.processes_total), ">PID", ">CHANGED"]);
        for process in diff.processes.iter().take(largest) {
            let changed = process.changed_pages.to_string();
            rows.add([command(&process.command, process.root), process.pid.to_string(), changed]);
        }
        text.push_str(&format!("\n{}", rows.text()));
    }
    text
}

fn mib(pages: u64) -> String {
    format!("{:.1}M", pages as f64 / 256.0)
}

fn share(part: u64, all: u64) -> String {
    format!("{:.1}%", part as f64 * 100.0 / all.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_make_a_set_whatever_they_say() {
        let changed = |pages, runs| ChangedPages {
            checkpoint: ramet_memory::ImageId::random(),
            since: ramet_memory::ImageId::random(),
            pages,
            runs,
        };
        assert_eq!(set(&changed(10, vec![[0, 2], [8, 100], [u64::MAX, u64::MAX]])).unwrap().count(), PageCount(4));
        assert!(set(&changed(u64::MAX, vec![])).is_err());
    }

    #[test]
    fn shares_of_nothing_are_nothing() {
        assert_eq!((share(0, 0), share(1, 4)), ("0.0%".to_owned(), "25.0%".to_owned()));
        assert_eq!(mib(1), "0.0M");
    }
}
