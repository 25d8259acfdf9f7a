//! The command line: parses, asks the daemon, prints for people or as JSON.
//!
//! Exit status: 0 done, 1 failed, 2 wrong usage.

mod arguments;
mod config;
mod copying;
mod doctor;
mod exports;
mod image;
mod interrupt;
mod jobs;
mod keys;
mod long;
mod output;
pub mod paste;
mod pools;
mod progress;
mod quickstart;
mod snapshots;
mod top;
mod transfer;
mod volumes;

use std::process::ExitCode;

use clap::Parser;

use crate::client::Client;
use crate::daemon::listeners::Listeners;
use crate::daemon::serve;
use arguments::{Arguments, Command};
use output::Output;

/// What a command needs besides its arguments.
pub struct Context {
    global: arguments::Global,
    output: Output,
}

impl Context {
    fn client(&self) -> crate::error::Result<Client> {
        Client::new(self.global.admin.as_deref(), self.global.token_file.as_deref(), self.global.ca.as_deref())
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    let output = Output { json: arguments.global.json, quiet: arguments.global.quiet };
    let context = Context { global: arguments.global, output };
    match run(&context, arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            context.output.error(&error);
            ExitCode::from(if error.is::<arguments::Usage>() { 2 } else { 1 })
        }
    }
}

fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Quickstart(command) => quickstart::run(context, &command),
        Command::Serve { config } => {
            let (config, file) = serve::load_config(config.as_deref())?;
            serve::serve(config, Some(file), None, Listeners::take_passed(), |_| output::ready())
        }
        Command::Doctor { config } => doctor::run(context, config.as_deref()),
        Command::Config(command) => config::run(context, command),
        Command::Pool(command) => pools::run(context, command),
        Command::Volume(command) => volumes::run(context, command),
        Command::Key(command) => keys::run(context, command),
        Command::Snapshot(command) => snapshots::run(context, command),
        Command::Export(command) => exports::run(context, command),
        Command::Image(command) => image::run(context, command),
        Command::Job(command) => jobs::run(context, command),
        Command::Top(command) => top::run(context, &command),
    }
}
