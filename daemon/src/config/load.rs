//! From text and environment to a checked [`Config`], with a line for everything that is wrong.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::check;
use super::environment;
use super::model::Config;
use super::schema::{Node, Schema, nearest};

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file and line, or the environment variable.
    pub place: String,
    pub message: String,
}

/// Everything that is wrong with a configuration.
#[derive(Debug)]
pub struct ConfigError(pub Vec<Problem>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self.0.iter().map(|problem| format!("{}: {}", problem.place, problem.message)).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl std::error::Error for ConfigError {}

/// Where each key was set, by its path (`daemon.threads`, `export.0.volume`).
pub(super) struct Places {
    file: String,
    lines: BTreeMap<String, usize>,
    pub(super) variables: BTreeMap<String, String>,
}

impl Places {
    /// The place of `path`, or of the table around it.
    pub(super) fn of(&self, path: &str) -> String {
        let mut path = path;
        loop {
            if let Some(variable) = self.variables.get(path) {
                return format!("environment {variable}");
            }
            if let Some(line) = self.lines.get(path) {
                return format!("{}:{line}", self.file);
            }
            match path.rsplit_once('.') {
                Some((parent, _)) => path = parent,
                None => return self.file.clone(),
            }
        }
    }
}

/// Loads `file` (or the defaults without one) with the environment of this process.
pub fn load(file: Option<&Path>) -> Result<Config, ConfigError> {
    let text = match file {
        None => String::new(),
        Some(path) => std::fs::read_to_string(path).map_err(|error| {
            let message = format!("{error}; name the configuration with --config FILE, or write one: `novastor config example`");
            ConfigError(vec![Problem { place: path.display().to_string(), message }])
        })?,
    };
    let name = file.map_or("defaults".to_owned(), |path| path.display().to_string());
    load_text(&name, &text, variables(std::env::vars_os())?)
}

/// Those that can be read; of the others, what is not meant for novastor is nobody's concern here.
fn variables(all: impl Iterator<Item = (OsString, OsString)>) -> Result<Vec<(String, String)>, ConfigError> {
    let (mut variables, mut problems) = (Vec::new(), Vec::new());
    for (name, value) in all {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => variables.push((name, value)),
            (Ok(name), Err(_)) if name.starts_with(environment::PREFIX) => {
                problems.push(Problem { place: format!("environment {name}"), message: "is not UTF-8: set it again".to_owned() });
            }
            (Err(name), _) if name.as_encoded_bytes().starts_with(environment::PREFIX.as_bytes()) => {
                let message = "its name is not UTF-8: unset it".to_owned();
                problems.push(Problem { place: format!("environment {}", name.display()), message });
            }
            _ => {}
        }
    }
    fail_on(problems)?;
    Ok(variables)
}

/// Loads `text`, called `file` in messages, with these environment variables.
pub fn load_text(file: &str, text: &str, variables: Vec<(String, String)>) -> Result<Config, ConfigError> {
    let schema = Schema::new();
    let mut places = Places { file: file.to_owned(), lines: BTreeMap::new(), variables: BTreeMap::new() };
    let parsed = DeTable::parse(text).map_err(|error| syntax_problem(file, text, &error))?;
    let mut problems = check::not_yet(parsed.get_ref(), file, text);
    if problems.is_empty() {
        let mut walk = Walk { text, places: &mut places, problems: &mut problems };
        walk.table(parsed.get_ref(), schema.root(), "");
    }
    let mut table: toml::Table = toml::from_str(text).map_err(|error| syntax_problem(file, text, &error))?;
    problems.extend(check::secrets_in_file(&table, &places));
    environment::apply(&mut table, &schema, variables, &mut places, &mut problems);
    fail_on(problems)?;

    let config: Config = serde_path_to_error::deserialize(toml::Value::Table(table)).map_err(|error| {
        let path = error.path().to_string().replace('[', ".").replace(']', "");
        let message = error.inner().message().to_owned();
        let key = if path == "." { String::new() } else { format!("{path}: ") };
        ConfigError(vec![Problem { place: places.of(&path), message: format!("{key}{message}") }])
    })?;
    fail_on(check::check(&config, &places))?;
    Ok(resolve_paths(config))
}

fn fail_on(problems: Vec<Problem>) -> Result<(), ConfigError> {
    if problems.is_empty() { Ok(()) } else { Err(ConfigError(problems)) }
}

/// Paths count from the folder the daemon was started in; they are made absolute once, here.
fn resolve_paths(mut config: Config) -> Config {
    let absolute = |path: &mut PathBuf| {
        if let Ok(full) = std::path::absolute(&*path) {
            *path = full;
        }
    };
    absolute(&mut config.daemon.data_dir);
    config.daemon.socket_dirs.iter_mut().chain(&mut config.daemon.adopt_dirs).for_each(absolute);
    config.pool.values_mut().filter_map(|pool| pool.path.as_mut()).for_each(absolute);
    config
}

fn syntax_problem(file: &str, text: &str, error: &toml::de::Error) -> ConfigError {
    let line = error.span().map_or(1, |span| line_of(text, span.start));
    let message = error.message().lines().next().unwrap_or("not TOML").to_owned();
    ConfigError(vec![Problem { place: format!("{file}:{line}"), message }])
}

/// The line, counted from 1, of byte `offset`.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}

/// Notes the line of every key and refuses unknown ones.
struct Walk<'a> {
    text: &'a str,
    places: &'a mut Places,
    problems: &'a mut Vec<Problem>,
}

impl Walk<'_> {
    fn table(&mut self, table: &DeTable<'_>, node: Node<'_>, path: &str) {
        for (key, value) in table.iter() {
            let name: &str = key.get_ref();
            let here = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
            let line = line_of(self.text, key.span().start);
            self.places.lines.insert(here.clone(), line);
            match node.key(name) {
                Some(inner) => self.value(value, inner, &here),
                None => self.unknown(name, node, path, line),
            }
        }
    }

    fn value(&mut self, value: &Spanned<DeValue<'_>>, node: Node<'_>, path: &str) {
        match value.get_ref() {
            DeValue::Table(table) if !node.keys().is_empty() || node.has_free_names() => self.table(table, node, path),
            DeValue::Array(items) => {
                let Some(inner) = node.item() else { return };
                for (index, item) in items.iter().enumerate() {
                    let here = format!("{path}.{index}");
                    self.places.lines.insert(here.clone(), line_of(self.text, item.span().start));
                    self.value(item, inner, &here);
                }
            }
            _ => {}
        }
    }

    fn unknown(&mut self, name: &str, node: Node<'_>, path: &str, line: usize) {
        let known = node.keys();
        let section = if path.is_empty() { "the file".to_owned() } else { format!("[{path}]") };
        let advice = match nearest(name, &known) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("it knows {}", known.join(", ")),
        };
        let message = format!("unknown key `{name}` in {section}: {advice}");
        self.problems.push(Problem { place: format!("{}:{line}", self.places.file), message });
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn what_is_no_utf8_in_the_environment_is_skipped_unless_it_is_ours() {
        let bad = || OsString::from_vec(vec![b'a', 0xff]);
        let read = |name: OsString, value: OsString| variables([("A".into(), "b".into()), (name, value)].into_iter());
        for (name, value) in [("OTHER".into(), bad()), (bad(), "x".into())] {
            assert_eq!(read(name, value).unwrap(), [("A".to_owned(), "b".to_owned())]);
        }
        let refused = read("NOVASTOR_DAEMON__NODE".into(), bad()).unwrap_err().to_string();
        assert!(refused.starts_with("environment NOVASTOR_DAEMON__NODE: is not UTF-8"), "{refused}");
        let name = OsString::from_vec([&b"NOVASTOR_"[..], &[0xff]].concat());
        assert!(read(name, "x".into()).unwrap_err().to_string().contains("its name is not UTF-8"));
    }
}
