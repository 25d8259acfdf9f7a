//! Overrides from the environment: `NOVASTOR_<SECTION>__<KEY>`, such as `NOVASTOR_DAEMON__THREADS=4` or
//! `NOVASTOR_POOL__LOCAL__PATH=/srv/pool`. A name's `-` and `.` are written `_`. Lists are separated by commas.

use toml::{Table, Value};

use super::load::{Places, Problem};
use super::schema::{Node, Schema, nearest};

pub(super) const PREFIX: &str = "NOVASTOR_";
const SEPARATOR: &str = "__";

/// Sets what `variables` say in `table`.
pub(super) fn apply(
    table: &mut Table,
    schema: &Schema,
    variables: Vec<(String, String)>,
    places: &mut Places,
    problems: &mut Vec<Problem>,
) {
    for (variable, text) in variables {
        let Some(rest) = variable.strip_prefix(PREFIX).filter(|rest| rest.contains(SEPARATOR)) else { continue };
        let rest = rest.to_ascii_lowercase();
        let segments: Vec<&str> = rest.split(SEPARATOR).collect();
        match set(table, schema.root(), &segments, &text, String::new()) {
            Ok(path) => {
                places.variables.insert(path, variable);
            }
            Err(message) => problems.push(Problem { place: format!("environment {variable}"), message }),
        }
    }
}

fn set(table: &mut Table, node: Node<'_>, segments: &[&str], text: &str, path: String) -> Result<String, String> {
    let Some((segment, rest)) = segments.split_first() else { return Err("names no key".to_owned()) };
    let name = if node.has_free_names() { existing_name(table, segment) } else { (*segment).to_owned() };
    let inner = node.key(&name).ok_or_else(|| unknown(segment, node, &path))?;
    let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
    if rest.is_empty() {
        table.insert(name, typed(inner, text)?);
        return Ok(path);
    }
    if let Some(item) = inner.item() {
        let (index, rest) = (rest[0], &rest[1..]);
        let slot = table.get_mut(&name).and_then(Value::as_array_mut);
        let entry = slot.and_then(|items| items.get_mut(index.parse::<usize>().ok()?)).and_then(Value::as_table_mut);
        let entry = entry.ok_or_else(|| format!("the file has no [[{name}]] number {index} (counted from 0)"))?;
        return set(entry, item, rest, text, format!("{path}.{index}"));
    }
    let entry = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
    let entry = entry.as_table_mut().ok_or_else(|| format!("{path} is no table"))?;
    set(entry, inner, rest, text, path)
}

/// The name in the file that is written like `segment` in a variable.
fn existing_name(table: &Table, segment: &str) -> String {
    let written = |name: &str| name.replace(['-', '.'], "_");
    table.keys().find(|name| written(name) == segment).cloned().unwrap_or_else(|| segment.to_owned())
}

fn unknown(segment: &str, node: Node<'_>, path: &str) -> String {
    let known = node.keys();
    let section = if path.is_empty() { "the configuration".to_owned() } else { format!("[{path}]") };
    match nearest(segment, &known) {
        Some(near) => format!("unknown key `{segment}` in {section}: did you mean `{near}`?"),
        None => format!("unknown key `{segment}` in {section}: it knows {}", known.join(", ")),
    }
}

fn typed(node: Node<'_>, text: &str) -> Result<Value, String> {
    if node.is("array") && !text.trim_start().starts_with('[') {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        return Ok(Value::Array(items.map(|item| Value::String(item.to_owned())).collect()));
    }
    if node.is("string") {
        return Ok(Value::String(text.to_owned()));
    }
    let literal = format!("value = {text}").parse::<Table>().ok().and_then(|mut table| table.remove("value"));
    Ok(literal.unwrap_or_else(|| Value::String(text.to_owned())))
}
