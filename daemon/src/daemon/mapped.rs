//! Pools that hold mapped volumes, made from their configuration and what this host brings.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use backends::file::FilePool;
use backends::{Layout, Pool, PoolError, VolumeRecord};
use blockdev::ReactorHandle;
use parking_lot::RwLock;
use volume::pool::{Dedup, MappedPool, MappedPoolOptions, VolumePolicy};
use volume::{Allowed, Durability, WhenFull};

use super::known_pools::KnownPools;
use crate::config::{Config, PolicyConfig, PoolConfig};
use crate::error::{Error, Result};
use crate::units::parse_size;

/// The configuration as it is now; a reload replaces it.
pub type LiveConfig = Arc<RwLock<Arc<Config>>>;

/// What pools need of the daemon they are opened in.
pub struct Host {
    pub data_dir: PathBuf,
    /// The pools that were open before.
    pub known: KnownPools,
    pub config: LiveConfig,
    /// The data-plane threads.
    pub reactors: Vec<ReactorHandle>,
    /// Carries the requests to object stores.
    pub runtime: tokio::runtime::Handle,
}

impl Host {
    fn options(&self, pool: &str, config: &PoolConfig) -> Result<MappedPoolOptions> {
        let (live, of_keys, of_policies) = (self.config.clone(), self.config.clone(), self.config.clone());
        let fallback = (default_durability(config), parse_when_full(config.when_full.as_deref().unwrap_or_default()));
        let log_size = parse_size(&live.read().daemon.log_size).map_err(Error::invalid)?;
        Ok(MappedPoolOptions {
            homes: self.reactors.clone(),
            log_folder: self.data_dir.join("log").join(pool),
            log_size,
            policy: Box::new(move |record| policy(&live.read().clone(), record, fallback)),
            encrypts: Box::new(move |record| {
                let policies = &of_policies.read().policy;
                record.policy.as_ref().and_then(|policy| policies.get(policy)).is_some_and(|policy| policy.encryption)
            }),
            keks: Box::new(move || {
                let found = of_keys.read().keys.as_ref().map(crate::config::key_encryption_keys).transpose();
                found.map(Option::unwrap_or_default).map_err(|error| PoolError::Invalid(error.to_string()))
            }),
        })
    }

    /// A pool of raw and of mapped volumes in one directory.
    pub fn file_pool(&self, name: &str, config: &PoolConfig, path: &Path) -> Result<Arc<dyn Pool>> {
        let place = backends::file::FilePoolConfig { path: path.to_owned() };
        let files = FilePool::open_expecting(name, place, self.known.expected(name))?;
        self.known.opened(name, files.uuid())?;
        Ok(Arc::new(MappedPool::beside(files, self.options(name, config)?)))
    }

    /// A pool of mapped volumes in a bucket, made if there is none.
    #[cfg(feature = "object-store")]
    pub fn s3_pool(&self, name: &str, config: &PoolConfig) -> Result<Arc<dyn Pool>> {
        use backends::segments::object::{S3Config, S3Store};
        use backends::segments::{OpenOptions, StoreError};

        let (access_key_id, secret_key) = crate::config::s3_access_key(config).map_err(Error::invalid)?;
        let usual = S3Config::new(config.bucket.as_deref().unwrap_or_default(), &access_key_id, &secret_key);
        let place = S3Config {
            endpoint: config.endpoint.clone(),
            region: config.region.clone().unwrap_or(usual.region),
            prefix: config.prefix.clone().unwrap_or(usual.prefix),
            allow_http: config.allow_http.unwrap_or(usual.allow_http),
            ..usual
        };
        let expected = self.known.expected(name);
        let failed = |error: StoreError| match (expected, &error) {
            (Some(_), StoreError::Absent(_)) => Error::invalid(format!(
                "{error}, though it was open before; is the bucket the right one? To begin anew there: novastor pool forget {name}"
            )),
            (Some(_), StoreError::Refused(_)) => {
                Error::invalid(format!("{error}; if another pool is meant to be there now: novastor pool forget {name}"))
            }
            _ => Error::from(PoolError::Backend(error.to_string())),
        };
        let open = || {
            let options = OpenOptions { expected, read_only: false, probe: Some(blockdev::random::uuid()) };
            S3Store::open(place.clone(), self.runtime.clone(), options)
        };
        let store = match open() {
            Err(StoreError::Absent(_)) if expected.is_none() => {
                match S3Store::make(place.clone(), self.runtime.clone(), blockdev::random::uuid()) {
                    // Another host may have been faster.
                    Ok(()) | Err(StoreError::Exists(_)) => open(),
                    Err(error) => Err(error),
                }
            }
            opened => opened,
        };
        let store = Arc::new(store.map_err(failed)?);
        let pool = store.header().uuid;
        self.known.opened(name, pool)?;
        Ok(Arc::new(MappedPool::in_store(name, "s3", place.location(), (store, pool), self.options(name, config)?)))
    }

    #[cfg(not(feature = "object-store"))]
    pub fn s3_pool(&self, _name: &str, _config: &PoolConfig) -> Result<Arc<dyn Pool>> {
        Err(Error::unsupported("this build has no object stores: use one with the feature `object-store`"))
    }
}

/// Of volumes without a policy: the log is as near as a pool of files, and may be lost where a bucket is not.
fn default_durability(config: &PoolConfig) -> Durability {
    match config.durability.as_deref() {
        Some(durability) => parse_durability(durability),
        None if config.driver == "s3" => Durability::Remote,
        None => Durability::Local,
    }
}

/// One that was checked when the configuration was loaded.
fn parse_durability(durability: &str) -> Durability {
    if durability == "local" { Durability::Local } else { Durability::Remote }
}

/// One that was checked when the configuration was loaded.
fn parse_dedup(dedup: &str) -> Dedup {
    match dedup {
        "none" => Dedup::None,
        "tenant" => Dedup::Tenant,
        _ => Dedup::Volume,
    }
}

/// One that was checked when the configuration was loaded.
fn parse_compression(compression: &str) -> Allowed {
    match compression {
        "cold" => Allowed::Cold,
        "none" => Allowed::Off,
        "lz4" => Allowed::Lz4,
        "zstd" => Allowed::Zstd,
        _ => Allowed::Auto,
    }
}

/// One that was checked when the configuration was loaded.
fn parse_when_full(when_full: &str) -> WhenFull {
    if when_full == "error" { WhenFull::Error } else { WhenFull::Wait }
}

/// `fallback`: what holds where the policy does not say.
fn policy(
    config: &Config,
    record: &VolumeRecord,
    (durability, when_full): (Durability, WhenFull),
) -> backends::pool::Result<VolumePolicy> {
    let silent = VolumePolicy { durability, compression: Allowed::Auto, dedup: Dedup::Volume, when_full };
    let Some(name) = &record.policy else { return Ok(silent) };
    let Some(policy) = config.policy.get(name) else {
        tracing::warn!(
            "volume {}: its policy {name} is not configured any more: flushes wait for the pool, until [policy.{name}] is there",
            record.name
        );
        return Ok(VolumePolicy { durability: Durability::Remote, ..silent });
    };
    if let Some(why) = refusal(name, policy, record.layout) {
        return Err(PoolError::Unsupported(format!("volume {}: {why}: change the policy", record.name)));
    }
    Ok(VolumePolicy {
        durability: policy.durability.as_deref().map_or(durability, parse_durability),
        compression: policy.compression.as_deref().map_or(Allowed::Auto, parse_compression),
        dedup: policy.dedup.as_deref().map_or(Dedup::Volume, parse_dedup),
        when_full: policy.when_full.as_deref().map_or(when_full, parse_when_full),
    })
}

/// Why a volume cannot be what a policy asks for.
pub fn refusal(name: &str, policy: &PolicyConfig, layout: Layout) -> Option<String> {
    let asks = |key: &str, value: &str| format!("policy {name} asks for {key} = {value}, which");
    for (key, value) in [("compression", &policy.compression), ("dedup", &policy.dedup)] {
        match value.as_deref() {
            None => {}
            Some(value) if layout == Layout::Raw => {
                return Some(format!("{} a raw volume never has", asks(key, value)));
            }
            Some(_) => {}
        }
    }
    let waits = layout == Layout::Raw && policy.when_full.as_deref() == Some("wait");
    waits.then(|| format!("{} a raw volume cannot", asks("when_full", "wait")))
}

#[cfg(test)]
mod tests {
    use backends::VolumeSpec;

    use super::*;

    fn record(policy: Option<&str>) -> VolumeRecord {
        let policy = policy.map(str::to_owned);
        VolumeRecord::new(
            "v",
            &VolumeSpec { size: 4096, block_size: 512, layout: Layout::Mapped, policy, tenant: None, wrapped_key: None },
        )
    }

    #[test]
    fn durability_comes_from_the_policy_then_the_pool_then_the_driver() {
        let pool = |driver: &str, durability: Option<&str>| PoolConfig {
            driver: driver.to_owned(),
            durability: durability.map(str::to_owned),
            ..PoolConfig::default()
        };
        assert_eq!(default_durability(&pool("file", None)), Durability::Local);
        assert_eq!(default_durability(&pool("s3", None)), Durability::Remote);
        assert_eq!(default_durability(&pool("s3", Some("local"))), Durability::Local);
        assert_eq!(default_durability(&pool("file", Some("remote"))), Durability::Remote);

        let mut config = Config::default();
        let of = |durability: Option<&str>| PolicyConfig { durability: durability.map(str::to_owned), ..PolicyConfig::default() };
        config.policy.insert("near".to_owned(), of(Some("local")));
        config.policy.insert("silent".to_owned(), of(None));
        let found = |name: Option<&str>, fallback| policy(&config, &record(name), (fallback, WhenFull::Wait)).unwrap().durability;
        assert_eq!(found(None, Durability::Remote), Durability::Remote);
        assert_eq!(found(Some("near"), Durability::Remote), Durability::Local);
        assert_eq!(found(Some("silent"), Durability::Local), Durability::Local);
        assert_eq!(found(Some("gone"), Durability::Local), Durability::Remote, "nobody says that a log will do");
    }

    #[test]
    fn reduction_is_as_the_policy_says() {
        let mut config = Config::default();
        let mut found = |compression: Option<&str>, dedup: Option<&str>| {
            let of = PolicyConfig {
                compression: compression.map(str::to_owned),
                dedup: dedup.map(str::to_owned),
                ..PolicyConfig::default()
            };
            config.policy.insert("p".to_owned(), of);
            let policy = policy(&config, &record(Some("p")), (Durability::Local, WhenFull::Wait)).unwrap();
            (policy.compression, policy.dedup)
        };
        assert_eq!(found(None, None), (Allowed::Auto, Dedup::Volume));
        assert_eq!(found(Some("none"), Some("none")), (Allowed::Off, Dedup::None));
        assert_eq!(found(Some("cold"), Some("none")), (Allowed::Cold, Dedup::None));
        assert_eq!(found(Some("lz4"), Some("volume")), (Allowed::Lz4, Dedup::Volume));
        assert_eq!(found(Some("zstd"), Some("tenant")), (Allowed::Zstd, Dedup::Tenant));
    }

    #[test]
    fn what_a_policy_asks_for_in_vain_is_refused() {
        let of = |compression: &str, dedup: &str, encryption| PolicyConfig {
            durability: None,
            compression: Some(compression.to_owned()).filter(|value| !value.is_empty()),
            dedup: Some(dedup.to_owned()).filter(|value| !value.is_empty()),
            when_full: None,
            encryption,
        };
        let why = |policy: PolicyConfig, layout| refusal("gold", &policy, layout).unwrap_or_default();
        assert_eq!(why(of("", "", false), Layout::Raw), "");
        assert_eq!(why(of("auto", "", false), Layout::Mapped), "");
        assert!(why(of("auto", "", false), Layout::Raw).contains("a raw volume never has"));
        assert_eq!(why(of("lz4", "none", false), Layout::Mapped), "");
        assert!(why(of("lz4", "", false), Layout::Raw).contains("compression = lz4"));
        assert_eq!(why(of("", "tenant", false), Layout::Mapped), "");
        assert!(why(of("", "tenant", false), Layout::Raw).contains("dedup = tenant"));
        assert_eq!([Layout::Raw, Layout::Mapped].map(|layout| why(of("", "", true), layout)), ["", ""]);
        let full = |what: &str| PolicyConfig { when_full: Some(what.to_owned()), ..PolicyConfig::default() };
        assert!(why(full("wait"), Layout::Raw).contains("when_full = wait, which a raw volume cannot"));
        assert_eq!([why(full("error"), Layout::Raw), why(full("wait"), Layout::Mapped)], ["", ""]);
    }

    #[test]
    fn what_becomes_of_writes_without_space_is_as_the_policy_says_or_else_the_pool() {
        let mut config = Config::default();
        let of = |when_full: Option<&str>| PolicyConfig { when_full: when_full.map(str::to_owned), ..PolicyConfig::default() };
        for (name, when_full) in [("silent", None), ("patient", Some("wait")), ("strict", Some("error"))] {
            config.policy.insert(name.to_owned(), of(when_full));
        }
        let found = |name: Option<&str>, pool: &str| {
            policy(&config, &record(name), (Durability::Local, parse_when_full(pool))).unwrap().when_full
        };
        assert_eq!([found(None, ""), found(Some("silent"), "wait"), found(Some("patient"), "error")], [WhenFull::Wait; 3]);
        assert_eq!([found(None, "error"), found(Some("silent"), "error"), found(Some("strict"), "")], [WhenFull::Error; 3]);
        assert_eq!(found(Some("gone"), "error"), WhenFull::Error);
    }
}
