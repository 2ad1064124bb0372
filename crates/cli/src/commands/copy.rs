//! Copying a file into or out of a guest.

use std::{
    ffi::OsString,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use ramet_client::Client;
use tokio::io::AsyncWriteExt as _;

use crate::{args::CpArgs, context::Context, output};

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side<'a> {
    Here(&'a str),
    Guest { vm: &'a str, path: &'a str },
}

/// `VM:PATH` when there is a colon before any slash.
fn side(text: &str) -> Side<'_> {
    match text.split_once(':') {
        Some((vm, path)) if !vm.is_empty() && !vm.contains('/') => Side::Guest { vm, path },
        _ => Side::Here(text),
    }
}

pub(crate) async fn run(context: &Context, args: &CpArgs) -> Result<()> {
    let client = context.client()?;
    match (side(&args.source), side(&args.target)) {
        (Side::Here(path), Side::Guest { vm, path: to }) => put(&client, path, vm, to).await,
        (Side::Guest { vm, path: from }, Side::Here(path)) => get(&client, vm, from, path).await,
        (Side::Here(_), Side::Here(_)) => bail!("One side has to be in a guest: VM:PATH"),
        (Side::Guest { .. }, Side::Guest { .. }) => bail!("One side has to be on this machine, not VM:PATH"),
    }
}

/// `path`, with the file's name appended when it names a directory by a slash at its end.
fn guest_path(path: &str, file: &Path) -> Result<String> {
    if !path.starts_with('/') {
        bail!("The path in the guest has to begin with a slash: '{path}' does not");
    }
    if !path.ends_with('/') {
        return Ok(path.to_owned());
    }
    let name = file.file_name().and_then(|n| n.to_str()).context("The file has no name to take over")?;
    Ok(format!("{path}{name}"))
}

async fn put(client: &Client, path: &str, vm: &str, to: &str) -> Result<()> {
    let to = guest_path(to, Path::new(path))?;
    let file = tokio::fs::File::open(path).await.with_context(|| format!("Can't open {path}"))?;
    let metadata = file.metadata().await.with_context(|| format!("Can't look at {path}"))?;
    if !metadata.is_file() {
        bail!("{path} is no regular file; a directory goes by `tar c -C DIR . | ramet exec -i {vm} -- tar x -C DIR`");
    }
    let mode = metadata.permissions().mode() & 0o7777;
    client.put_file(vm, &to, mode, metadata.len(), file).await?;
    Ok(())
}

async fn get(client: &Client, vm: &str, from: &str, to: &str) -> Result<()> {
    if !from.starts_with('/') {
        bail!("The path in the guest has to begin with a slash: '{from}' does not");
    }
    let mut stream = client.get_file(vm, from).await?;
    if to == "-" {
        while let Some(bytes) = stream.next().await? {
            output::write(&bytes)?;
        }
        return Ok(());
    }
    let mut target = PathBuf::from(to);
    if target.is_dir() {
        target.push(Path::new(from).file_name().context("The path in the guest names no file")?);
    }
    // Under another name until it is whole.
    let mut part: OsString = target.clone().into();
    part.push(format!(".part-{}", std::process::id()));
    let part = PathBuf::from(part);
    let written = async {
        let mut file =
            tokio::fs::File::create(&part).await.with_context(|| format!("Can't write {}", part.display()))?;
        while let Some(bytes) = stream.next().await? {
            file.write_all(&bytes).await.with_context(|| format!("Can't write {}", part.display()))?;
        }
        file.flush().await.with_context(|| format!("Can't write {}", part.display()))?;
        tokio::fs::rename(&part, &target).await.with_context(|| format!("Can't write {}", target.display()))
    }
    .await;
    if written.is_err() {
        // What is left of it is of no use; the first error is the one to tell.
        let _ = tokio::fs::remove_file(&part).await;
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart() {
        assert_eq!(side("web:/etc/x"), Side::Guest { vm: "web", path: "/etc/x" });
        for here in ["file", "./a:b", "/x:y", ":x", "-"] {
            assert_eq!(side(here), Side::Here(here));
        }
    }

    #[test]
    fn a_directory_in_the_guest_takes_the_files_name() {
        assert_eq!(guest_path("/tmp/", Path::new("a/b.txt")).unwrap(), "/tmp/b.txt");
        assert_eq!(guest_path("/tmp/c", Path::new("a/b.txt")).unwrap(), "/tmp/c");
        assert!(guest_path("tmp", Path::new("b")).is_err());
    }
}
