//! The daemon's log on its error output; the level can change while it runs.

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use crate::config::{LogConfig, LogFormat};
use crate::error::{Error, Result};

/// Changes the level.
pub struct LogControl {
    filter: reload::Handle<Targets, Registry>,
}

impl LogControl {
    /// Starts logging; once per process.
    pub fn start(config: &LogConfig) -> Result<LogControl> {
        let (filter, handle) = reload::Layer::new(parse(&config.level)?);
        let writer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let format = match config.format {
            LogFormat::Text => writer.with_ansi(false).with_target(false).boxed(),
            LogFormat::Json => writer.json().flatten_event(true).boxed(),
        };
        let started = tracing_subscriber::registry().with(filter).with(format).try_init();
        started.map_err(|error| Error::internal(format!("logging: {error}")))?;
        Ok(LogControl { filter: handle })
    }

    pub fn set_level(&self, level: &str) -> Result<()> {
        self.filter.reload(parse(level)?).map_err(|error| Error::internal(format!("log level: {error}")))
    }
}

fn parse(level: &str) -> Result<Targets> {
    level.parse().map_err(|error| Error::invalid(format!("log level {level:?}: {error}")))
}
