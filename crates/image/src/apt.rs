//! Packages of the distribution, with all that they need, downloaded by apt and unpacked without being installed.
//!
//! apt resolves as for a machine with nothing on it (an empty status file), so the result does not depend on what this
//! machine has; it also checks signatures and checksums.
//!
//! Packages of another suite than this machine's come from the distribution's mirror that this machine uses. Neither
//! the machine's list of sources nor its own package lists are changed for that, and only the distribution's own keys
//! are trusted.

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

/// What an installed system has, whatever else is in it: patterns of apt.
const SYSTEM: [&str; 3] = ["?essential", "?priority(required)", "apt"];

/// Package lists, as another apt can read them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lists {
    /// Where they are.
    pub(crate) dir: PathBuf,
    /// Sources that have them, in apt's format of one line each.
    pub(crate) sources: String,
    /// The same for the guest's own use later: without passwords, and without the files of this machine.
    pub(crate) lasting: String,
}

/// apt with its own places for what it would write.
#[derive(Debug)]
pub(crate) struct Apt {
    archives: PathBuf,
    status: PathBuf,
    empty: PathBuf,
    pkgcache: PathBuf,
    suite: Option<Suite>,
}

/// Another suite than this machine's.
#[derive(Debug)]
struct Suite {
    name: String,
    mirror: Mirror,
    /// Where its packages come from, for apt.
    sources: PathBuf,
    /// apt's settings, without this machine's hooks.
    config: PathBuf,
    /// Its package lists.
    lists: PathBuf,
}

impl Suite {
    fn new(name: &str, cache: &Path, work: &Path) -> Result<Self, ImageError> {
        check_suite(name)?;
        let suite = Self {
            name: name.to_owned(),
            mirror: Mirror::of_this_machine()?,
            sources: work.join("sources.list"),
            config: work.join("apt.conf"),
            lists: cache.join(format!("lists-{name}")),
        };
        fs::create_dir_all(suite.lists.join("partial")).named("make", &suite.lists)?;
        fs::write(&suite.sources, suite.mirror.sources(name)).named("write", &suite.sources)?;
        // What is to be run after an update of this machine's lists.
        fs::write(&suite.config, "#clear APT::Update;\n").named("write", &suite.config)?;
        Ok(suite)
    }

    /// Has apt know this suite and nothing else.
    fn tell(&self, command: &mut Command) {
        command.arg("-c").arg(&self.config);
        for (name, path) in [
            ("Dir::Etc::sourcelist", self.sources.as_path()),
            ("Dir::State::lists", &self.lists),
            ("Dir::Etc::sourceparts", Path::new("/dev/null")),
            ("Dir::Etc::preferences", Path::new("/dev/null")),
            ("Dir::Etc::preferencesparts", Path::new("/dev/null")),
        ] {
            command.arg("-o").arg(option(name, path));
        }
        for unsafe_way in ["AllowInsecureRepositories", "AllowWeakRepositories", "AllowDowngradeToInsecureRepositories"]
        {
            command.arg("-o").arg(format!("Acquire::{unsafe_way}=false"));
        }
        // Of backports apt takes nothing by itself where the base suite has it too. A setting of this machine must not
        // count.
        command.args(["-o", "APT::Default-Release="]);
        if base_suite(&self.name).is_some() {
            command.args(["-t", &self.name]);
        }
    }
}

/// Where this machine has its distribution's packages from.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mirror {
    uri: String,
    /// The same for people: without a password.
    shown: String,
    keyring: PathBuf,
}

/// What [`find_mirror`] understands.
const MIRROR_FORMAT: &str = "$(REPO_URI)|$(SITE)|$(COMPONENT)|$(RELEASE)|$(ORIGIN)|$(SIGNED_BY)";

impl Mirror {
    fn of_this_machine() -> Result<Self, ImageError> {
        let release = ["/etc/os-release", "/usr/lib/os-release"].iter().find_map(|path| fs::read_to_string(path).ok());
        let Some(id) = release.as_deref().and_then(os_id) else {
            return Err(ImageError::Failed {
                what: "tell which distribution this is".into(),
                reason: "/etc/os-release has no ID that is a plain word; build without `--suite`".into(),
            });
        };
        let output = run(Command::new("apt-get").env("LC_ALL", "C").stdin(Stdio::null()).args([
            "indextargets",
            "--format",
            MIRROR_FORMAT,
            "Created-By: Packages",
        ]))?;
        if !output.good {
            return Err(ImageError::Apt { what: "find the distribution's mirror".into(), reason: output.stderr });
        }
        let Some(mirror) = find_mirror(&output.stdout, id) else {
            return Err(ImageError::Apt {
                what: "find the distribution's mirror".into(),
                reason: format!(
                    "no source has {id}'s own component main: the package lists may be empty, `apt-get update` fills them"
                ),
            });
        };
        if !mirror.keyring.is_file() {
            return Err(ImageError::Failed {
                what: format!("find the keys of {id}"),
                reason: format!(
                    "{} is missing; install the distribution's package of archive keys, such as debian-archive-keyring or ubuntu-keyring",
                    mirror.keyring.display()
                ),
            });
        }
        Ok(mirror)
    }

    /// A list of sources that has the suite, and what it builds upon, alone.
    fn sources(&self, suite: &str) -> String {
        let line = |suite: &str| {
            format!("deb [signed-by={} target=Packages] {} {suite} main\n", self.keyring.display(), self.uri)
        };
        std::iter::once(suite).chain(base_suite(suite)).map(line).collect()
    }

    /// The same for a guest.
    fn lasting(&self, suite: &str) -> String {
        let line = |suite: &str| format!("deb {} {suite} main\n", self.shown);
        std::iter::once(suite).chain(base_suite(suite)).map(line).collect()
    }
}

impl Apt {
    /// Uses `cache` for downloads and `work` for what is of this build alone. Packages come from `suite`, or else from
    /// where this machine has its own.
    pub(crate) fn new(cache: &Path, work: &Path, suite: Option<&str>) -> Result<Self, ImageError> {
        let suite = suite.map(|name| Suite::new(name, cache, work)).transpose()?;
        let (archives, status, empty) = (cache.join("debs"), work.join("status"), work.join("no-archives"));
        let apt = Self { archives, status, empty, pkgcache: work.join("pkgcache.bin"), suite };
        for dir in [&apt.archives, &apt.empty] {
            fs::create_dir_all(dir.join("partial")).named("make", dir)?;
        }
        fs::write(&apt.status, "").named("write", &apt.status)?;
        Ok(apt)
    }

    fn command(&self, archives: &Path) -> Command {
        let mut command = Command::new("apt-get");
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
        command.arg("-o").arg(option("Dir::State::status", &self.status));
        command.arg("-o").arg(option("Dir::Cache::archives", archives));
        // So that the lists are read once in a build.
        command.arg("-o").arg(option("Dir::Cache::pkgcache", &self.pkgcache));
        command.arg("-o").arg(option("Dir::Cache::srcpkgcache", &self.pkgcache.with_extension("src")));
        // The places are ours alone, and the one that downloads need not be another user's.
        command.args(["-o", "Debug::NoLocking=true", "-o", "APT::Sandbox::User=root", "-o", "APT::Status-Fd=1"]);
        command.args(["-o", "APT::Get::AllowUnauthenticated=false", "-qq", "--yes", "--no-install-recommends"]);
        if let Some(suite) = &self.suite {
            suite.tell(&mut command);
        }
        command
    }

    /// The suite, when it is not this machine's.
    pub(crate) fn suite(&self) -> Option<&str> {
        self.suite.as_ref().map(|suite| suite.name.as_str())
    }

    /// Reads the package lists of the suite. Those of this machine are taken as they are.
    pub(crate) fn update(&self, progress: &mut dyn FnMut(Progress)) -> Result<(), ImageError> {
        let Some(suite) = &self.suite else { return Ok(()) };
        progress(Progress { stage: Stage::Updating, fraction: 0.0 });
        let mut command = self.command(&self.empty);
        // Otherwise it is no error to go on with older lists, or with none.
        command.args(["-o", "APT::Update::Error-Mode=any", "update"]);
        let Some(reason) = fetch(&mut command, Stage::Updating, progress)? else { return Ok(()) };
        if reason.contains("does not have a Release file") {
            // Nothing is kept for a name that was mistyped.
            let _ = fs::remove_dir_all(&suite.lists);
            return Err(ImageError::NoSuite { suite: suite.name.clone(), mirror: suite.mirror.shown.clone() });
        }
        if reason.contains("is not signed") || reason.contains("NO_PUBKEY") {
            return Err(ImageError::Untrusted {
                suite: suite.name.clone(),
                keyring: suite.mirror.keyring.clone(),
                reason,
            });
        }
        Err(ImageError::Apt { what: format!("read the package lists of the suite {:?}", suite.name), reason })
    }

    fn no_package(&self, package: &str) -> ImageError {
        let package = package.to_owned();
        match self.suite() {
            Some(suite) => ImageError::NoSuitePackage { package, suite: suite.to_owned() },
            None => ImageError::NoPackage { package },
        }
    }

    /// The packages and all that they depend on, in the order of their names.
    pub(crate) fn resolve(&self, packages: &[&str]) -> Result<Vec<Deb>, ImageError> {
        for package in packages {
            if !is_package_name(package) {
                return Err(self.no_package(package));
            }
        }
        let output = self.ask(packages)?;
        if !output.good {
            if let Some(package) = packages.iter().find(|package| output.stderr.contains(&format!("package {package}")))
            {
                return Err(self.no_package(package));
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

    fn ask(&self, packages: &[&str]) -> Result<Output, ImageError> {
        run(self.command(&self.empty).args(["--print-uris", "install", "--"]).args(packages))
    }

    /// What [`Apt::resolve`] finds for the packages and for what every installed system has.
    pub(crate) fn resolve_system(&self, packages: &[&str]) -> Result<Vec<Deb>, ImageError> {
        let wanted: Vec<&str> = SYSTEM.iter().chain(packages).copied().collect();
        let named = packages.iter().all(|package| is_package_name(package));
        let output = if named { self.ask(&wanted)? } else { Output::default() };
        if !output.good {
            // Names the package, if one of them is to blame.
            self.resolve(packages)?;
            let what = format!("find what a system with {} needs", packages.join(", "));
            return Err(ImageError::Apt { what, reason: output.stderr });
        }
        let mut found: Vec<Deb> = output.stdout.lines().filter_map(parse_uri).collect();
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// Downloads what [`Apt::resolve_system`] finds for the same packages, unless it is there.
    pub(crate) fn download_system(
        &self,
        packages: &[&str],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), ImageError> {
        let all: Vec<&str> = SYSTEM.iter().chain(packages).copied().collect();
        self.download(&all, progress)
    }

    /// Where a downloaded package is.
    pub(crate) fn path(&self, deb: &Deb) -> PathBuf {
        self.archives.join(&deb.file)
    }

    /// The package lists that this resolves with, and a list of sources that has them: with it an apt elsewhere can
    /// read the lists.
    pub(crate) fn lists(&self) -> Result<Lists, ImageError> {
        if let Some(suite) = &self.suite {
            let sources = suite.mirror.sources(&suite.name);
            let lasting = suite.mirror.lasting(&suite.name);
            return Ok(Lists { dir: suite.lists.clone(), sources, lasting });
        }
        let output = run(Command::new("apt-get").env("LC_ALL", "C").stdin(Stdio::null()).args([
            "indextargets",
            "--format",
            MIRROR_FORMAT,
            "Created-By: Packages",
        ]))?;
        let dir = run(Command::new("apt-config").env("LC_ALL", "C").stdin(Stdio::null()).args([
            "shell",
            "DIR",
            "Dir::State::lists/d",
        ]))?;
        let Some(dir) = dir.stdout.trim().strip_prefix("DIR='").and_then(|dir| dir.strip_suffix('\'')) else {
            return Err(ImageError::Apt { what: "find this machine's package lists".into(), reason: dir.stderr });
        };
        let (sources, lasting) = sources_of(&output.stdout);
        Ok(Lists { dir: PathBuf::from(dir), sources, lasting })
    }

    /// Downloads what [`Apt::resolve`] finds for the same packages, unless it is there.
    pub(crate) fn download(&self, packages: &[&str], progress: &mut dyn FnMut(Progress)) -> Result<(), ImageError> {
        let mut command = self.command(&self.archives);
        command.args(["--download-only", "install", "--"]).args(packages);
        match fetch(&mut command, Stage::Downloading, progress)? {
            None => Ok(()),
            Some(reason) => Err(ImageError::Apt { what: format!("download {}", packages.join(", ")), reason }),
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

/// An option of apt.
fn option(name: &str, path: &Path) -> OsString {
    let mut text = OsString::from(name);
    text.push("=");
    text.push(path);
    text
}

/// Has apt download something; what it said if it could not.
fn fetch(
    command: &mut Command,
    stage: Stage,
    progress: &mut dyn FnMut(Progress),
) -> Result<Option<String>, ImageError> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let tool = |source| ImageError::Tool { tool: "apt-get".into(), source };
    let mut child = command.spawn().map_err(tool)?;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if let Some(percent) = parse_progress(&line) {
                progress(Progress { stage, fraction: percent / 100.0 });
            }
        }
    }
    let mut stderr = String::new();
    if let Some(mut from) = child.stderr.take() {
        from.read_to_string(&mut stderr).map_err(tool)?;
    }
    Ok(if child.wait().map_err(tool)?.success() { None } else { Some(said(&stderr)) })
}

#[derive(Default)]
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
    let lines: Vec<&str> =
        stderr.lines().map(|line| line.trim_start_matches("E: ").trim_start_matches("W: ").trim()).collect();
    lines.into_iter().filter(|line| !line.is_empty()).take(6).collect::<Vec<_>>().join("; ")
}

/// Debian policy 5.6.1, so that a name is never an option or a path.
fn is_package_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.len() >= 2 && name.bytes().next().is_some_and(plain) && name.bytes().all(|b| plain(b) || b"+-.".contains(&b))
}

/// Whether that can be the name of a suite: it becomes part of a list of sources, of options and of paths.
pub(crate) fn check_suite(suite: &str) -> Result<(), ImageError> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if (1..=40).contains(&suite.len()) && !suite.starts_with('-') && suite.bytes().all(plain) {
        Ok(())
    } else {
        Err(ImageError::BadSuite { suite: suite.to_owned() })
    }
}

/// The suite that a suite of backports builds upon.
fn base_suite(suite: &str) -> Option<&str> {
    suite.strip_suffix("-backports").filter(|base| !base.is_empty())
}

/// The distribution's name for programs, out of `os-release`.
fn os_id(release: &str) -> Option<&str> {
    let value = release.lines().find_map(|line| line.strip_prefix("ID="))?.trim();
    let id = value.trim_matches(['"', '\'']);
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (!id.is_empty() && id.bytes().all(|b| plain(b) || b"-_.".contains(&b)) && id.bytes().next().is_some_and(plain))
        .then_some(id)
}

/// The mirror of the distribution `id` among apt's sources, which are given as [`MIRROR_FORMAT`]. Sources of others,
/// and those of the distribution's security updates, do not have its suites.
fn find_mirror(targets: &str, id: &str) -> Option<Mirror> {
    targets.lines().find_map(|line| {
        let fields: Vec<&str> = line.splitn(6, '|').collect();
        let [uri, site, component, release, origin, signed_by] = fields.as_slice() else { return None };
        let extra = ["-security", "-updates", "/updates"].iter().any(|end| release.ends_with(end));
        if !origin.eq_ignore_ascii_case(id) || *component != "main" || extra || !is_mirror(uri) {
            return None;
        }
        // Older versions of apt do not tell, and it may be a key instead of its file.
        let keyring = if is_keyring(signed_by) {
            PathBuf::from(signed_by)
        } else {
            PathBuf::from(format!("/usr/share/keyrings/{id}-archive-keyring.gpg"))
        };
        let shown = site.trim_end_matches('/').to_owned();
        Some(Mirror { uri: (*uri).to_owned(), shown, keyring })
    })
}

/// Lists of sources out of all that this machine has, given as [`MIRROR_FORMAT`]: one to read its package lists by, and
/// one for guests, of what is signed by a distribution's own package of keys.
fn sources_of(targets: &str) -> (String, String) {
    let (mut sources, mut lasting) = (String::new(), String::new());
    for line in targets.lines() {
        let fields: Vec<&str> = line.splitn(6, '|').collect();
        let [uri, site, component, release, origin, _] = fields.as_slice() else { continue };
        let word =
            |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b));
        if !is_mirror(uri) || !word(component) || !word(release) {
            continue;
        }
        let add = |to: &mut String, line: String| {
            if !to.contains(&line) {
                to.push_str(&line);
            }
        };
        add(&mut sources, format!("deb [target=Packages] {uri} {release} {component}\n"));
        if ["debian", "ubuntu"].contains(&origin.to_lowercase().as_str()) {
            add(&mut lasting, format!("deb {} {release} {component}\n", site.trim_end_matches('/')));
        }
    }
    (sources, lasting)
}

/// Whether that can stand in a list of sources as it is, and has more than one suite.
fn is_mirror(uri: &str) -> bool {
    let plain = |c: char| c.is_ascii_graphic() && !"[]#\"".contains(c);
    uri.contains(":/") && !uri.starts_with("cdrom:") && uri.chars().all(plain)
}

/// Whether that can stand in an option of a list of sources as it is.
fn is_keyring(path: &str) -> bool {
    path.starts_with('/') && path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b))
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

    #[test]
    fn names_of_suites_are_plain_words() {
        for good in ["sid", "bullseye", "trixie-backports", "24", "a-", &"x".repeat(40)] {
            assert!(check_suite(good).is_ok(), "{good:?}");
        }
        let long = "x".repeat(41);
        for bad in
            ["", "-", "-t", "--yes", "-backports", "Sid", "a b", "a/b", "../x", "a.b", "a\nb", "a]b", "a=b", "é", &long]
        {
            let error = check_suite(bad).unwrap_err();
            assert!(matches!(&error, ImageError::BadSuite { suite } if suite == bad), "{bad:?}");
            assert!(error.to_string().contains("a-z, 0-9"));
        }
    }

    #[test]
    fn backports_build_upon_their_base() {
        assert_eq!(base_suite("trixie-backports"), Some("trixie"));
        for own in ["trixie", "backports", "-backports", "trixie-backports-sloppy"] {
            assert_eq!(base_suite(own), None);
        }
    }

    #[test]
    fn the_distribution_names_itself() {
        assert_eq!(os_id("NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\n"), Some("debian"));
        assert_eq!(os_id("ID=\"ubuntu\"\nID_LIKE=debian"), Some("ubuntu"));
        for bad in ["", "VERSION_ID=12", "ID=", "ID=../x", "ID=.x", "ID=a b"] {
            assert_eq!(os_id(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_mirror_is_the_distributions_own() {
        let targets = "\
https://deb.nodesource.com/node_20.x/|https://deb.nodesource.com/node_20.x|main|nodistro|. nodistro|$(SIGNED_BY)
http://sec.debian.org/debian-security/|http://sec.debian.org/debian-security|main|bookworm-security|Debian|$(SIGNED_BY)
http://x/debian/|http://x/debian|main|bookworm-updates|Debian|$(SIGNED_BY)
http://x/debian/|http://x/debian|contrib|bookworm|Debian|$(SIGNED_BY)
cdrom://[Debian 12]/|cdrom://[Debian 12]|main|bookworm|Debian|$(SIGNED_BY)
http://u:p@deb.debian.org/debian/|http://deb.debian.org/debian|main|bookworm|Debian|$(SIGNED_BY)
http://later/debian/|http://later/debian|main|bookworm|Debian|$(SIGNED_BY)
";
        let mirror = find_mirror(targets, "debian").unwrap();
        let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
        assert_eq!(
            (mirror.shown.as_str(), mirror.keyring.as_path()),
            ("http://deb.debian.org/debian", Path::new(keyring))
        );
        let line = |suite: &str| {
            format!("deb [signed-by={keyring} target=Packages] http://u:p@deb.debian.org/debian/ {suite} main\n")
        };
        assert_eq!(mirror.sources("sid"), line("sid"));
        assert_eq!(mirror.sources("trixie-backports"), line("trixie-backports") + &line("trixie"));
        assert_eq!(find_mirror(targets, "ubuntu"), None);
        // Lists that were never read have no origin.
        assert_eq!(find_mirror("http://x/|http://x|main|bookworm|$(ORIGIN)|$(SIGNED_BY)", "debian"), None);
        assert_eq!(find_mirror("garbage\n|||||\n||", "debian"), None);
    }

    #[test]
    fn sources_are_those_of_this_machine_without_its_secrets() {
        let targets = "\
http://u:p@x/debian/|http://x/debian|main|bookworm|Debian|$(SIGNED_BY)
http://u:p@x/debian/|http://x/debian|main|bookworm|Debian|$(SIGNED_BY)
http://x/sec/|http://x/sec|main|bookworm-security|Debian|/k
http://other/|http://other|main|nodistro|. nodistro|/k
http://x/|http://x|$(COMPONENT)|a b|Debian|
cdrom:[x]/|cdrom|main|bookworm|Debian|
";
        let (sources, lasting) = sources_of(targets);
        let expected = "deb [target=Packages] http://u:p@x/debian/ bookworm main\n\
                        deb [target=Packages] http://x/sec/ bookworm-security main\n\
                        deb [target=Packages] http://other/ nodistro main\n";
        assert_eq!(sources, expected);
        assert_eq!(lasting, "deb http://x/debian bookworm main\ndeb http://x/sec bookworm-security main\n");
    }

    #[test]
    fn a_sources_own_keyring_is_taken_only_as_a_plain_path() {
        let of = |signed: &str| {
            find_mirror(&format!("http://x/|http://x|main|sid|Debian|{signed}"), "debian").unwrap().keyring
        };
        assert_eq!(of("/etc/apt/keyrings/own.gpg"), Path::new("/etc/apt/keyrings/own.gpg"));
        for other in ["", "$(SIGNED_BY)", "-----BEGIN PGP", "/a b", "/a] http://evil", "ABCDEF0123456789"] {
            assert_eq!(of(other), Path::new("/usr/share/keyrings/debian-archive-keyring.gpg"), "{other:?}");
        }
    }
}
