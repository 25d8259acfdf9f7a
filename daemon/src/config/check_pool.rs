//! What the keys of a pool must be, by driver.

use super::check::Checker;
use super::model::PoolConfig;
use super::schema::nearest;
use super::secret;

/// The drivers that work.
pub(super) const DRIVERS: [&str; 5] = ["file", "rbd", "s3", "memory", "null"];
const RBD_KEYS: [&str; 8] =
    ["pool", "conf", "user", "namespace", "cluster", "keyring", "connect_timeout_seconds", "request_timeout_seconds"];
const S3_KEYS: [&str; 11] = [
    "durability",
    "when_full",
    "bucket",
    "endpoint",
    "region",
    "prefix",
    "access_key_id_file",
    "access_key_id",
    "secret_key_file",
    "secret_key",
    "allow_http",
];

/// The keys that a driver has, and the one that it cannot do without.
fn keys_of(driver: &str) -> Option<(&'static [&'static str], Option<&'static str>)> {
    match driver {
        "file" => Some((&["path", "durability", "when_full"], Some("path"))),
        "rbd" => Some((&RBD_KEYS, Some("pool"))),
        "s3" => Some((&S3_KEYS, Some("bucket"))),
        "memory" | "null" => Some((&[], None)),
        _ => None,
    }
}

/// The keys that were set.
fn given(pool: &PoolConfig) -> Vec<&'static str> {
    let keys = [
        ("path", pool.path.is_some()),
        ("durability", pool.durability.is_some()),
        ("when_full", pool.when_full.is_some()),
        ("pool", pool.pool.is_some()),
        ("conf", pool.conf.is_some()),
        ("user", pool.user.is_some()),
        ("namespace", pool.namespace.is_some()),
        ("cluster", pool.cluster.is_some()),
        ("keyring", pool.keyring.is_some()),
        ("connect_timeout_seconds", pool.connect_timeout_seconds.is_some()),
        ("request_timeout_seconds", pool.request_timeout_seconds.is_some()),
        ("bucket", pool.bucket.is_some()),
        ("endpoint", pool.endpoint.is_some()),
        ("region", pool.region.is_some()),
        ("prefix", pool.prefix.is_some()),
        ("access_key_id_file", pool.access_key_id_file.is_some()),
        ("access_key_id", pool.access_key_id.is_some()),
        ("secret_key_file", pool.secret_key_file.is_some()),
        ("secret_key", pool.secret_key.is_some()),
        ("allow_http", pool.allow_http.is_some()),
    ];
    keys.into_iter().filter(|(_, is_given)| *is_given).map(|(key, _)| key).collect()
}

impl Checker<'_> {
    pub(super) fn pool(&mut self, name: &str, pool: &PoolConfig) {
        let path = format!("pool.{name}");
        self.name("pool", name, &path);
        let Some((allowed, needed)) = keys_of(&pool.driver) else { return self.no_driver(&path, &pool.driver) };
        let given = given(pool);
        for key in given.iter().filter(|key| !allowed.contains(key)) {
            self.refuse(&format!("{path}.{key}"), format!("driver \"{}\" has no key `{key}`", pool.driver));
        }
        if let Some(needed) = needed.filter(|needed| !given.contains(needed)) {
            self.refuse(&path, format!("driver \"{}\" needs the key `{needed}`", pool.driver));
        }
        self.durability(&path, pool.durability.as_ref());
        self.when_full(&path, pool.when_full.as_ref());
        if pool.connect_timeout_seconds.is_some_and(|seconds| !(1..=3600).contains(&seconds)) {
            self.refuse(&format!("{path}.connect_timeout_seconds"), "choose 1 to 3600 seconds");
        }
        if pool.request_timeout_seconds.is_some_and(|seconds| seconds > 86_400) {
            self.refuse(&format!("{path}.request_timeout_seconds"), "choose at most 86400 seconds; 0 waits for ever");
        }
        if let Some(Err(error)) = pool.keyring.as_deref().filter(|keyring| keyring.exists()).map(secret::check_secret) {
            self.refuse(&format!("{path}.keyring"), error);
        }
        if pool.driver == "s3" {
            self.s3(&path, pool);
        }
    }

    fn no_driver(&mut self, path: &str, driver: &str) {
        let known = DRIVERS.join(", ");
        if driver.is_empty() {
            return self.refuse(path, format!("needs a driver: one of {known}"));
        }
        let advice = nearest(driver, &DRIVERS).map(|near| format!("; did you mean \"{near}\"?"));
        self.refuse(&format!("{path}.driver"), format!("no driver {driver:?}: there are {known}{}", advice.unwrap_or_default()));
    }

    fn s3(&mut self, path: &str, pool: &PoolConfig) {
        if !cfg!(feature = "object-store") {
            self.refuse(&format!("{path}.driver"), "this build has no object stores: use one with the feature `object-store`");
        }
        if let Err(error) = secret::s3_access_key(pool) {
            self.refuse(path, error);
        }
        let is_open = pool.endpoint.as_ref().is_some_and(|endpoint| !endpoint.starts_with("https://"));
        if is_open && pool.allow_http != Some(true) {
            self.refuse(
                &format!("{path}.endpoint"),
                "an endpoint without TLS is refused: write https://…, or set allow_http = true where the network is trusted",
            );
        }
    }
}
