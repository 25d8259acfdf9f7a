//! The JSON Schema of the configuration, and what the loader asks it: which keys are known where, and of what type.

use schemars::schema_for;
use serde_json::Value;

use super::model::Config;

/// The schema, generated from the types.
pub fn json_schema() -> Value {
    schema_for!(Config).to_value()
}

/// The schema as a tree to walk.
pub(super) struct Schema {
    root: Value,
}

/// One place in the schema.
#[derive(Clone, Copy)]
pub(super) struct Node<'a> {
    schema: &'a Schema,
    value: &'a Value,
}

impl Schema {
    pub(super) fn new() -> Schema {
        Schema { root: json_schema() }
    }

    pub(super) fn root(&self) -> Node<'_> {
        Node { schema: self, value: &self.root }
    }
}

impl<'a> Node<'a> {
    fn at(self, value: &'a Value) -> Node<'a> {
        Node { schema: self.schema, value }.resolved()
    }

    /// Follows references, and the non-null side of an option.
    fn resolved(self) -> Node<'a> {
        let mut value = self.value;
        loop {
            let reference = value.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix('#'));
            let alternatives = value.get("anyOf").and_then(Value::as_array);
            let inner = alternatives.and_then(|options| options.iter().find(|option| option.get("$ref").is_some()));
            value = match (reference.and_then(|path| self.schema.root.pointer(path)), inner) {
                (Some(target), _) => target,
                (None, Some(target)) => target,
                (None, None) => return Node { schema: self.schema, value },
            };
        }
    }

    /// The keys known here; empty for a table of free names.
    pub(super) fn keys(self) -> Vec<&'a str> {
        let properties = self.value.get("properties").and_then(Value::as_object);
        properties.map(|keys| keys.keys().map(String::as_str).collect()).unwrap_or_default()
    }

    /// True where any name is a key.
    pub(super) fn has_free_names(self) -> bool {
        self.value.get("additionalProperties").is_some_and(Value::is_object)
    }

    pub(super) fn key(self, name: &str) -> Option<Node<'a>> {
        let known = self.value.get("properties").and_then(|keys| keys.get(name));
        let free = self.value.get("additionalProperties").filter(|schema| schema.is_object());
        known.or(free).map(|value| self.at(value))
    }

    pub(super) fn item(self) -> Option<Node<'a>> {
        self.value.get("items").map(|value| self.at(value))
    }

    /// True if the type may be `name`, as JSON Schema calls it.
    pub(super) fn is(self, name: &str) -> bool {
        match self.value.get("type") {
            Some(Value::String(only)) => only == name,
            Some(Value::Array(several)) => several.iter().any(|one| one == name),
            _ => false,
        }
    }
}

/// The known word nearest to `word`, if one is near.
pub(super) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let scored = known.iter().map(|candidate| (distance(word, candidate), *candidate));
    let limit = (word.chars().count() / 3).max(2);
    scored.min().filter(|(distance, _)| *distance <= limit).map(|(_, candidate)| candidate)
}

/// Edit distance, a swap of neighbours counting as one.
fn distance(left: &str, right: &str) -> usize {
    let (left, right): (Vec<char>, Vec<char>) = (left.chars().take(64).collect(), right.chars().take(64).collect());
    let width = right.len() + 1;
    let mut table: Vec<usize> = (0..(left.len() + 1) * width).map(|at| if at < width { at } else { 0 }).collect();
    for row in 1..=left.len() {
        table[row * width] = row;
        for column in 1..width {
            let cost = usize::from(left[row - 1] != right[column - 1]);
            let mut best = (table[(row - 1) * width + column] + 1)
                .min(table[row * width + column - 1] + 1)
                .min(table[(row - 1) * width + column - 1] + cost);
            if row > 1 && column > 1 && left[row - 1] == right[column - 2] && left[row - 2] == right[column - 1] {
                best = best.min(table[(row - 2) * width + column - 2] + 1);
            }
            table[row * width + column] = best;
        }
    }
    table[left.len() * width + right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_nearest_word() {
        assert_eq!(nearest("sokcet_mode", &["socket_group", "socket_mode"]), Some("socket_mode"));
        assert_eq!(nearest("thread", &["threads", "node"]), Some("threads"));
        assert_eq!(nearest("colour", &["threads", "node"]), None);
    }

    #[test]
    fn knows_the_shape_of_the_configuration() {
        let schema = Schema::new();
        let root = schema.root();
        assert!(root.keys().contains(&"daemon"));
        assert!(root.key("daemon").unwrap().key("threads").unwrap().is("integer"));
        assert!(root.key("pool").unwrap().has_free_names());
        assert!(root.key("pool").unwrap().key("any").unwrap().key("path").unwrap().is("string"));
        assert!(root.key("tls").unwrap().key("cert").unwrap().is("string"));
        assert!(root.key("export").unwrap().item().unwrap().key("read_only").unwrap().is("boolean"));
        assert!(root.key("daemon").unwrap().key("nbd").unwrap().is("array"));
    }
}
