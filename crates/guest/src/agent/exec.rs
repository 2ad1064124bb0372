//! Commands. One thread runs a command and moves its output; a second one moves its input, if the host sends any.

use crate::child;
use crate::stream::Stream;
use crate::threads::helper;
use ramet_guest::protocol::{Exec, MAX_PAYLOAD, kind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::Arc;

/// The hidden command by which the agent starts a command on a terminal of its own.
pub(crate) const TTY_HELPER: &str = "exec-on-terminal";

/// More than the output pipes of a command that has ended can hold (1 MiB each at most, unless root has raised it).
const MOST_IN_PIPES: usize = 2 * 1024 * 1024;

/// Where the bytes of a command come from, and as what they go to the host.
type Output = (u8, File);

struct Started {
    child: Child,
    outputs: Vec<Output>,
    input: Option<Input>,
    /// Holds the terminal open until the command has ended: without, a read of the other side could fail early.
    terminal: Option<OwnedFd>,
}

enum Input {
    Pipe(File),
    Terminal(File),
}

/// Runs a command to its end.
pub(crate) fn run(stream: &Arc<Stream>, exec: Exec, close: &dyn Fn()) {
    let mut started = match start(stream, &exec) {
        Ok(started) => started,
        Err(error) => {
            close();
            let program = exec.argv.first().map_or("", String::as_str);
            return stream.send(kind::ERROR, format!("cannot run {program:?} in the guest: {error}").as_bytes());
        }
    };
    if let Some(input) = started.input.take() {
        let of_thread = Arc::clone(stream);
        if let Err(error) = helper(move || feed(&of_thread, input)) {
            stream.send(kind::STDERR, format!("ramet-agent: no thread for the standard input: {error}\n").as_bytes());
        }
    }
    let status = move_output(stream, &mut started);
    stream.end_input();
    stream.set_terminal(None);
    close();
    match status {
        Ok(status) => {
            // As shells do: the signal's number above 128.
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            stream.send(kind::EXIT, &code.to_le_bytes());
        }
        Err(error) => stream.send(kind::ERROR, format!("lost the command: {error}").as_bytes()),
    }
    stream.detach();
    // Children of the command may still write: they must not fail for want of a reader. (Those on a terminal see it
    // hang up instead.)
    if !exec.tty {
        drain(stream, started.outputs);
    }
}

/// Reads and drops what comes, until no one can write any more.
fn drain(stream: &Arc<Stream>, mut outputs: Vec<Output>) {
    let mut buffer = vec![0; 4096];
    while !outputs.is_empty() {
        let mut polled: Vec<PollFd<'_>> = outputs.iter().map(|(_, file)| PollFd::new(file, PollFlags::IN)).collect();
        match poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        for at in (0..outputs.len()).rev() {
            let (kind, file) = &mut outputs[at];
            if ready[at] && move_some(stream, *kind, file, &mut buffer) == 0 {
                drop(outputs.remove(at));
            }
        }
    }
}

fn start(stream: &Arc<Stream>, exec: &Exec) -> io::Result<Started> {
    let [program, args @ ..] = exec.argv.as_slice() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no program is named"));
    };
    let result = if exec.tty { start_on_terminal(stream, exec) } else { start_on_pipes(exec, program, args) };
    if let Ok(started) = &result {
        stream.set_process(Pid::from_raw(started.child.id().cast_signed()));
    }
    result
}

fn settle(command: &mut Command, exec: &Exec) {
    let home = if std::env::var_os("HOME").is_some() { None } else { Some(("HOME", "/root")) };
    command.envs(home).envs(exec.env.iter().map(|(name, value)| (name, value)));
    if let Some(cwd) = &exec.cwd {
        command.current_dir(cwd);
    }
}

fn start_on_pipes(exec: &Exec, program: &str, args: &[String]) -> io::Result<Started> {
    let mut command = Command::new(program);
    settle(&mut command, exec);
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    command.stdin(if exec.stdin { Stdio::piped() } else { Stdio::null() });
    child::of_host(&mut command);
    let mut child = command.spawn()?;
    let mut outputs = Vec::with_capacity(2);
    outputs.extend(child.stdout.take().map(|out| (kind::STDOUT, File::from(OwnedFd::from(out)))));
    outputs.extend(child.stderr.take().map(|out| (kind::STDERR, File::from(OwnedFd::from(out)))));
    let input = child.stdin.take().map(|input| Input::Pipe(File::from(OwnedFd::from(input))));
    Ok(Started { child, outputs, input, terminal: None })
}

fn start_on_terminal(stream: &Arc<Stream>, exec: &Exec) -> io::Result<Started> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let terminal = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty())?;
    stream.set_terminal(Some(master.try_clone()?));
    if exec.rows > 0 && exec.cols > 0 {
        stream.resize(exec.rows, exec.cols);
    }
    // A process becomes leader of a session only by its own call: so this program starts the command.
    let mut command = Command::new("/proc/self/exe");
    command.env("TERM", std::env::var_os("TERM").filter(|t| t != "dumb").unwrap_or_else(|| "linux".into()));
    settle(&mut command, exec);
    command.arg(TTY_HELPER).args(&exec.argv);
    child::of_host(&mut command);
    let clone = || terminal.try_clone().map(Stdio::from);
    let child = command.stdin(clone()?).stdout(clone()?).stderr(clone()?).spawn()?;
    let input = Some(Input::Terminal(File::from(master.try_clone()?)));
    Ok(Started { child, outputs: vec![(kind::STDOUT, File::from(master))], input, terminal: Some(terminal) })
}

/// The child's side of [`start_on_terminal`].
pub(crate) fn tty_helper(argv: &[&str]) -> ExitCode {
    let [program, args @ ..] = argv else { return ExitCode::from(2) };
    let ready = rustix::process::setsid().and_then(|_| rustix::process::ioctl_tiocsctty(io::stdin().as_fd()));
    let error = match ready {
        Ok(()) => Command::new(program).args(args).exec(),
        Err(error) => error.into(),
    };
    eprintln!("ramet-agent: cannot run {program:?}: {error}");
    ExitCode::from(127)
}

/// Moves input from the host to the command until either ends.
fn feed(stream: &Arc<Stream>, input: Input) {
    let (mut file, is_terminal) = match input {
        Input::Pipe(file) => (file, false),
        Input::Terminal(file) => (file, true),
    };
    let mut works = true;
    while let Some(bytes) = stream.next_input() {
        // A command that has closed its input does not stop the host from sending: it is dropped.
        works = works && file.write_all(&bytes).is_ok();
        stream.took(bytes.len());
    }
    if is_terminal && !stream.is_detached() {
        const END_OF_TRANSMISSION: &[u8] = &[4];
        drop(file.write_all(END_OF_TRANSMISSION));
    }
}

/// Moves output to the host until the command has ended and nothing that it wrote is left.
fn move_output(stream: &Arc<Stream>, started: &mut Started) -> io::Result<ExitStatus> {
    let pid = Pid::from_raw(started.child.id().cast_signed()).ok_or(io::ErrorKind::NotFound)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let mut buffer = vec![0; MAX_PAYLOAD];
    let mut status = None;
    let mut after_end = 0;
    loop {
        let mut polled: Vec<PollFd<'_>> =
            started.outputs.iter().map(|(_, file)| PollFd::new(file, PollFlags::IN)).collect();
        let at_once = Timespec::default();
        if status.is_none() {
            polled.push(PollFd::new(&process, PollFlags::IN));
        }
        match poll(&mut polled, status.is_some().then_some(&at_once)) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        let ended = status.is_none() && ready.last() == Some(&true);
        if ended {
            // From here on the number of the process may be given to another one.
            stream.set_process(None);
            status = Some(started.child.wait()?);
            started.terminal = None;
        }
        let mut moved = 0;
        for at in (0..started.outputs.len()).rev() {
            if ready.get(at) == Some(&true) {
                let (kind, file) = &mut started.outputs[at];
                let length = move_some(stream, *kind, file, &mut buffer);
                moved += length;
                if length == 0 {
                    drop(started.outputs.remove(at));
                }
            }
        }
        if let Some(status) = status
            && !ended
        {
            // Its own output lies in the pipes by now; more comes from children that it left behind, perhaps for ever.
            after_end += moved;
            if moved == 0 || after_end > MOST_IN_PIPES {
                return Ok(status);
            }
        }
    }
}

/// Moves what can be read now, and gives its length: 0 at the end of the file.
fn move_some(stream: &Arc<Stream>, kind: u8, file: &mut File, buffer: &mut [u8]) -> usize {
    let credit = stream.take_credit(buffer.len());
    let room = credit.unwrap_or(buffer.len());
    let read = loop {
        match file.read(&mut buffer[..room]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal reports its end as an error.
            other => break other.unwrap_or(0),
        }
    };
    if credit.is_some() {
        stream.return_credit(room - read);
        if read > 0 {
            stream.send(kind, &buffer[..read]);
        }
    }
    read
}
