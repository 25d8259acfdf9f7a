//! Style rules that no compiler and no clippy lint knows, checked on every file git knows or would add.
//!
//! - A Rust file has at most 800 lines.
//! - No unfinished code, no debugging aids.
//! - No ignored tests, but for those that another test starts as a process of its own.
//! - No path of one developer's machine.
//! - Every crate takes the workspace's lints.
//! - Every fio job parses.

use crate::commands;
use anyhow::{Context, Result, bail};
use novastor_tests::rig::scratch::workspace_root;
use novastor_tests::rig::tools;
use std::fs;
use std::path::Path;
use std::process::Command;

const RUST_LINES_MAX: usize = 800;

/// Each word is written in two halves, lest this very list break the rule.
const FORBIDDEN_IN_RUST: [&str; 4] =
    [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("dbg", "!("), concat!("#[", "ignore")];
/// What makes an ignored test fine: it is no test by itself.
const SECOND_PROCESS: &str = "= \"the other process of ";
const FORBIDDEN_ANYWHERE: [&str; 2] = [concat!("/wo", "rk/"), concat!("/ro", "ot/")];

pub fn run() -> Result<()> {
    let mut problems = Vec::new();
    let files = files()?;
    for name in &files {
        let bytes = fs::read(workspace_root().join(name)).with_context(|| format!("reading {name}"))?;
        if let Ok(text) = str::from_utf8(&bytes) {
            problems.extend(check(name, text));
        }
    }
    problems.extend(check_fio_jobs(&files)?);
    if !problems.is_empty() {
        bail!("tidy found {} problems:\n{}", problems.len(), problems.join("\n"));
    }
    println!("tidy: {} files are fine", files.len());
    Ok(())
}

/// Tracked files and new ones, as they are in the work tree.
fn files() -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(workspace_root());
    let listing = String::from_utf8(commands::output(&mut git)?).context("git lists a file whose name is no UTF-8")?;
    let exists = |name: &&str| workspace_root().join(name).is_file();
    Ok(listing.split_terminator('\0').filter(exists).map(str::to_owned).collect())
}

fn check(name: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let is_rust = Path::new(name).extension().is_some_and(|extension| extension == "rs");
    let lines = text.lines().count();
    if is_rust && lines > RUST_LINES_MAX {
        problems.push(format!("{name}: {lines} lines, more than {RUST_LINES_MAX}: split it by purpose"));
    }
    let words = FORBIDDEN_IN_RUST.iter().filter(|_| is_rust).chain(&FORBIDDEN_ANYWHERE);
    for word in words {
        let found = text.lines().enumerate().filter(|(_, line)| line.contains(word) && !line.contains(SECOND_PROCESS));
        problems.extend(found.map(|(index, _)| format!("{name}:{}: `{word}` is not allowed", index + 1)));
    }
    let is_crate = name.ends_with("Cargo.toml") && text.contains("[package]") && !name.starts_with("fuzz/");
    if is_crate && !text.contains("[lints]\nworkspace = true") {
        problems.push(format!("{name}: lacks `[lints] workspace = true`"));
    }
    problems
}

fn check_fio_jobs(files: &[String]) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for job in files.iter().filter(|name| name.ends_with(".fio")) {
        let text = fs::read_to_string(workspace_root().join(job)).with_context(|| format!("reading {job}"))?;
        let mut fio = Command::new(tools::require("fio")?);
        // A job's variables are its user's to set; any value shows whether the rest parses.
        fio.envs(variables(&text).map(|name| (name, "1")));
        let checked = commands::output(fio.arg("--parse-only").arg(job).current_dir(workspace_root()));
        problems.extend(checked.err().map(|error| format!("{job}: {error:#}")));
    }
    Ok(problems)
}

/// The names in `${NAME}`.
fn variables(job: &str) -> impl Iterator<Item = &str> {
    job.split("${").skip(1).filter_map(|rest| rest.split_once('}')).map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variables_of_a_job_are_found() {
        let job = "[a]\nfilename=${DISK}\nsize=${SIZE}m\nname=$other {text}\n";
        assert_eq!(variables(job).collect::<Vec<_>>(), ["DISK", "SIZE"]);
    }

    #[test]
    fn each_rule_finds_what_it_forbids() {
        let long = "fn f() {}\n".repeat(RUST_LINES_MAX + 1);
        assert_eq!(check("a.rs", &long).len(), 1);
        assert_eq!(check("a.md", &long), Vec::<String>::new());
        for word in FORBIDDEN_IN_RUST.iter().chain(&FORBIDDEN_ANYWHERE) {
            assert_eq!(check("a.rs", &format!("first\n{word}")), [format!("a.rs:2: `{word}` is not allowed")]);
        }
        let second_process = format!("{} {SECOND_PROCESS}some_test\"]", FORBIDDEN_IN_RUST[3]);
        assert_eq!(check("a.rs", &second_process), Vec::<String>::new());
        assert_eq!(check("a/Cargo.toml", "[package]\n").len(), 1);
        assert_eq!(check("a/Cargo.toml", "[package]\n[lints]\nworkspace = true\n"), Vec::<String>::new());
    }
}
