//! `novastor key`.

use super::Context;
use super::arguments::Key;
use super::output::{facts, table};
use crate::api::types::{KeyErase, KeyErased, KeyInfo, KeyList, KeyRotate, KeysRotated, VolumeInfo};
use crate::client::{Client, encode};

pub fn run(context: &Context, command: Key) -> anyhow::Result<()> {
    let client = context.client()?;
    match command {
        Key::List { pool } => {
            let query = pool.map(|pool| format!("?pool={}", encode(&pool))).unwrap_or_default();
            let list: KeyList = client.get(&format!("/v1/keys{query}"))?;
            context.output.print(&list, list_text)
        }
        Key::Rotate { pool } => {
            let rotated: Vec<KeysRotated> = client.post("/v1/keys/rotate", &KeyRotate { pool })?;
            context.output.print(&rotated, |rotated| rotated_text(rotated))
        }
        Key::Erase { volume, consent } => {
            let volumes = sharing_key(&client, &volume)?;
            let what = format!("Erasing this key loses the content of {}, and of their snapshots, for good.", volumes.join(", "));
            context.output.confirm(consent.yes, &what)?;
            let erased: KeyErased = client.post("/v1/keys/erase", &KeyErase { volumes })?;
            context.output.print(&erased, erased_text)
        }
    }
}

/// All volumes that lose their content with this one. The daemon refuses if there are others by then.
fn sharing_key(client: &Client, volume: &str) -> anyhow::Result<Vec<String>> {
    let found: VolumeInfo = client.get(&format!("/v1/volumes/{}", encode(volume)))?;
    let full = format!("{}/{}", found.pool, found.name);
    let list: KeyList = client.get(&format!("/v1/keys?pool={}", encode(&found.pool)))?;
    let key = list.keys.into_iter().find(|key| key.volumes.contains(&full));
    Ok(key.map_or_else(|| vec![full], |key| key.volumes))
}

fn list_text(list: &KeyList) -> String {
    let none = || "none".to_owned();
    let head = facts([
        ("current key-encryption key", list.current.clone().unwrap_or_else(none)),
        ("previous", list.previous.clone().unwrap_or_default()),
    ]);
    if list.keys.is_empty() {
        return format!("{head}\n\nno pool has a key");
    }
    let row = |key: &KeyInfo| {
        let of = if key.of == "pool" { "the pool itself".to_owned() } else { key.volumes.join(", ") };
        let of = if of.is_empty() { "a deleted volume".to_owned() } else { of };
        [key.pool.clone(), of, state(key, list), key.wrapped_by.clone().unwrap_or_default()]
    };
    format!("{head}\n\n{}", table(["POOL", "KEY OF", "STATE", "WRAPPED BY"], list.keys.iter().map(row)))
}

fn state(key: &KeyInfo, list: &KeyList) -> String {
    let is = |kek: &Option<String>| kek.is_some() && *kek == key.wrapped_by;
    match key.state.as_str() {
        "wrapped" if is(&list.current) => "current".to_owned(),
        "wrapped" if is(&list.previous) => "to be rotated".to_owned(),
        "wrapped" => "its key-encryption key is not configured".to_owned(),
        "clear" => "not wrapped: nothing is encrypted".to_owned(),
        "damaged" => key.problem.clone().unwrap_or_default(),
        other => other.to_owned(),
    }
}

fn rotated_text(rotated: &[KeysRotated]) -> String {
    let line = |rotated: &KeysRotated| {
        let KeysRotated { pool, rewrapped, already } = rotated;
        match (rewrapped, already) {
            (0, 0) => format!("pool {pool}: has no keys"),
            (0, _) => format!("pool {pool}: all {already} keys were wrapped by the current key-encryption key already"),
            _ => format!("pool {pool}: {rewrapped} keys wrapped anew, {already} were already"),
        }
    };
    rotated.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn erased_text(erased: &KeyErased) -> String {
    let volumes = erased.volumes.join(", ");
    match erased.erased {
        true => format!("the key of {volumes} is erased: their content is gone; `novastor volume delete` removes what is left"),
        false => format!("the key of {volumes} was erased before"),
    }
}
