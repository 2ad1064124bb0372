//! The command line's reference as Markdown: `docs/cli.md`.

use clap::{Arg, Command, CommandFactory as _};

use crate::args::Cli;

const HEAD: &str = "\
# Command line

Made by `cargo xtask docs` out of the program's own help; do not edit.

Every command takes the global options. `VM` and `CHECKPOINT` are a name, an id of 32 hexadecimal digits, or the first
digits (four at least) of an id. Sizes are written `512M` or `1G`, times `90s`, `10m` or `2h`.
";

/// The whole reference.
pub(crate) fn markdown() -> String {
    let mut command = Cli::command();
    command.build();
    let mut text = HEAD.to_owned();
    text.push_str("\n## Global options\n\n");
    text.push_str(&options(command.get_arguments().filter(|a| a.is_global_set())));
    if let Some(codes) = command.get_after_help() {
        text.push_str(&format!("\n## Exit codes\n\n```text\n{codes}\n```\n"));
    }
    for sub in visible(&command) {
        section(sub, "ramet", &mut text);
    }
    text
}

fn visible(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help")
}

fn section(command: &Command, parent: &str, text: &mut String) {
    let name = format!("{parent} {}", command.get_name());
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    text.push_str(&format!("\n## `{name}`\n\n{about}{}\n", if about.ends_with('.') { "" } else { "." }));
    let own = || command.get_arguments().filter(|a| !a.is_global_set() && !a.is_hide_set() && a.get_id() != "version");
    if own().any(|a| a.get_id() != "help") || visible(command).next().is_none() {
        let usage = command.clone().render_usage().to_string();
        let usage = usage.trim_start_matches("Usage:").trim();
        text.push_str(&format!("\n```text\n{usage}\n```\n"));
        let list = options(own().filter(|a| a.get_id() != "help"));
        if !list.is_empty() {
            text.push_str(&format!("\n{list}"));
        }
    }
    for sub in visible(command) {
        section(sub, &name, text);
    }
}

fn options<'a>(args: impl Iterator<Item = &'a Arg>) -> String {
    let mut text = String::new();
    for arg in args {
        let mut names = Vec::new();
        if let Some(short) = arg.get_short() {
            names.push(format!("-{short}"));
        }
        if let Some(long) = arg.get_long() {
            names.push(format!("--{long}"));
        }
        let value = arg.get_value_names().map(|v| v.join(" ")).unwrap_or_default();
        let takes_value = arg.get_action().takes_values();
        let shown = match (names.is_empty(), takes_value) {
            (true, _) => value,
            (false, true) => format!("{} {value}", names.join(", ")),
            (false, false) => names.join(", "),
        };
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let mut extra = String::new();
        let default: Vec<_> = arg.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
        if takes_value && !default.is_empty() {
            extra.push_str(&format!(" Default: `{}`.", default.join(",")));
        }
        if let Some(env) = arg.get_env() {
            extra.push_str(&format!(" Environment: `{}`.", env.to_string_lossy()));
        }
        text.push_str(&format!("- `{shown}`: {help}{}{extra}\n", if help.ends_with('.') { "" } else { "." }));
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checked_in_reference_is_the_programs_own() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cli.md");
        let checked_in = std::fs::read_to_string(path).unwrap();
        assert!(checked_in == super::markdown(), "docs/cli.md is old: run `cargo xtask docs`");
    }
}
