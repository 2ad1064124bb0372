//! Packages of the distribution, with all that they need, downloaded by apt and unpacked without being installed.
//!
//! apt resolves as for a machine with nothing on it (an empty status file), so the result does not depend on what this
//! machine has; it also checks signatures and checksums.

use crate::build::{Progress, Stage};
use crate::error::{ImageError, Named};
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A package's file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Deb {
    /// `busybox-static_1:1.35.0-4_amd64.deb`, with `%3a` for `:` as apt writes it.
    pub(crate) file: String,
}

impl Deb {
    /// Name of the package.
    pub(crate) fn name(&self) -> &str {
        self.file.split('_').next().unwrap_or(&self.file)
    }

    /// `name version`.
    pub(crate) fn title(&self) -> String {
        let version = self.file.split('_').nth(1).unwrap_or("").replace("%3a", ":");
        format!("{} {version}", self.name())
    }
}

/// apt with its own places for what it would write.
#[derive(Debug)]
pub(crate) struct Apt {
    archives: PathBuf,
    status: PathBuf,
    empty: PathBuf,
}

impl Apt {
    /// Uses `cache` for downloads and `work` for what is of this build alone.
    pub(crate) fn new(cache: &Path, work: &Path) -> Result<Self, ImageError> {
        let apt = Self { archives: cache.join("debs"), status: work.join("status"), empty: work.join("no-archives") };
        for dir in [&apt.archives, &apt.empty] {
            fs::create_dir_all(dir.join("partial")).named("make", dir)?;
        }
        fs::write(&apt.status, "").named("write", &apt.status)?;
        Ok(apt)
    }

    fn command(&self, archives: &Path) -> Command {
        let mut command = Command::new("apt-get");
        let option = |name: &str, path: &Path| {
            let mut text = OsString::from(name);
            text.push("=");
            text.push(path);
            text
        };
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
        command.arg("-o").arg(option("Dir::State::status", &self.status));
        command.arg("-o").arg(option("Dir::Cache::archives", archives));
        // The places are ours alone, and the one that downloads need not be another user's.
        command.args(["-o", "Debug::NoLocking=true", "-o", "APT::Sandbox::User=root", "-o", "APT::Status-Fd=1"]);
        command.args(["-o", "APT::Get::AllowUnauthenticated=false", "-qq", "--yes", "--no-install-recommends"]);
        command
    }

    /// The packages and all that they depend on, in the order of their names.
    pub(crate) fn resolve(&self, packages: &[&str]) -> Result<Vec<Deb>, ImageError> {
        for package in packages {
            if !is_package_name(package) {
                return Err(ImageError::NoPackage { package: (*package).to_owned() });
            }
        }
        let output = run(self.command(&self.empty).args(["--print-uris", "install", "--"]).args(packages))?;
        if !output.good {
            if let Some(package) = packages.iter().find(|package| output.stderr.contains(&format!("package {package}")))
            {
                return Err(ImageError::NoPackage { package: (*package).to_owned() });
            }
            let what = format!("find what {} needs", packages.join(", "));
            return Err(ImageError::Apt { what, reason: output.stderr });
        }
        let mut found: Vec<Deb> = output.stdout.lines().filter_map(parse_uri).collect();
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// Whether the distribution has a package of that name.
    pub(crate) fn has(&self, package: &str) -> bool {
        run(self.command(&self.empty).args(["--print-uris", "install", "--", package])).is_ok_and(|output| output.good)
    }

    /// Downloads what [`Apt::resolve`] finds for the same packages, unless it is there.
    pub(crate) fn download(&self, packages: &[&str], progress: &mut dyn FnMut(Progress)) -> Result<(), ImageError> {
        let what = || format!("download {}", packages.join(", "));
        let mut command = self.command(&self.archives);
        command.args(["--download-only", "install", "--"]).args(packages);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let tool = |source| ImageError::Tool { tool: "apt-get".into(), source };
        let mut child = command.spawn().map_err(tool)?;
        if let Some(stdout) = child.stdout.take() {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(percent) = parse_progress(&line) {
                    progress(Progress { stage: Stage::Downloading, fraction: percent / 100.0 });
                }
            }
        }
        let mut stderr = String::new();
        if let Some(mut from) = child.stderr.take() {
            from.read_to_string(&mut stderr).map_err(tool)?;
        }
        if child.wait().map_err(tool)?.success() {
            Ok(())
        } else {
            Err(ImageError::Apt { what: what(), reason: said(&stderr) })
        }
    }

    /// Unpacks a downloaded package's files into a new directory `into`.
    pub(crate) fn unpack(&self, deb: &Deb, into: &Path) -> Result<(), ImageError> {
        let path = self.archives.join(&deb.file);
        let output = run(Command::new("dpkg-deb").arg("--extract").arg(&path).arg(into).stdin(Stdio::null()))?;
        if output.good {
            return Ok(());
        }
        // A damaged download would come back with every build.
        let _ = fs::remove_file(&path);
        Err(ImageError::Failed { what: format!("unpack {}", deb.file), reason: output.stderr })
    }
}

struct Output {
    good: bool,
    stdout: String,
    stderr: String,
}

fn run(command: &mut Command) -> Result<Output, ImageError> {
    let tool = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|source| ImageError::Tool { tool, source })?;
    Ok(Output {
        good: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: said(&String::from_utf8_lossy(&output.stderr)),
    })
}

/// What a tool said, on one line.
fn said(stderr: &str) -> String {
    let lines: Vec<&str> = stderr.lines().map(|line| line.trim_start_matches("E: ").trim()).collect();
    lines.into_iter().filter(|line| !line.is_empty()).take(6).collect::<Vec<_>>().join("; ")
}

/// Debian policy 5.6.1, so that a name is never an option or a path.
fn is_package_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.len() >= 2 && name.bytes().next().is_some_and(plain) && name.bytes().all(|b| plain(b) || b"+-.".contains(&b))
}

/// `'URL' FILE SIZE HASH`.
fn parse_uri(line: &str) -> Option<Deb> {
    let file = line.strip_prefix('\'')?.split_once("' ")?.1.split(' ').next()?;
    (file.ends_with(".deb") && !file.contains('/')).then(|| Deb { file: file.to_owned() })
}

/// `dlstatus:1:20.5:Retrieving...`.
fn parse_progress(line: &str) -> Option<f64> {
    line.strip_prefix("dlstatus:")?.split(':').nth(1)?.parse().ok().filter(|percent| (0.0..=100.0).contains(percent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_apt_are_understood() {
        let line = "'http://x/pool/b/busybox-static_1.35.0-4%2bb3_amd64.deb' busybox-static_1%3a1.35.0-4+b3_amd64.deb 9 SHA256:00";
        let deb = parse_uri(line).unwrap();
        assert_eq!((deb.name(), deb.title().as_str()), ("busybox-static", "busybox-static 1:1.35.0-4+b3"));
        assert_eq!(parse_uri("dlstatus:1:0:x"), None);
        assert_eq!(parse_uri("'http://x' ../../etc/passwd.deb 1 x"), None);
        assert_eq!(parse_progress("dlstatus:1:20.5:Retrieving file 1 of 2"), Some(20.5));
        assert_eq!(parse_progress("pmstatus:1:20.5:x"), None);
        assert_eq!(parse_progress("dlstatus:1:nan:x"), None);
    }

    #[test]
    fn names_of_packages_are_no_options() {
        assert!(is_package_name("libstdc++6") && is_package_name("python3.11"));
        for bad in ["", "x", "-o", "--yes", "a/b", "a b", "A", "../x", "x=1"] {
            assert!(!is_package_name(bad), "{bad:?}");
        }
    }
}
