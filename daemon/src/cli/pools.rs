//! `novastor pool`.

use super::arguments::Pool;
use super::output::{facts, table};
use super::volumes::report_text;
use super::{Context, long};
use crate::api::reply::Done;
use crate::api::types::{CheckReport, PoolInfo};
use crate::client::encode;
use crate::units::format_size;
use serde_json::json;

pub fn run(context: &Context, command: Pool) -> anyhow::Result<()> {
    let client = context.client()?;
    match command {
        Pool::List => {
            let pools: Vec<PoolInfo> = client.get("/v1/pools")?;
            context.output.print(&pools, |pools| list(pools))
        }
        Pool::Show { pool } => {
            let pool: PoolInfo = client.get(&format!("/v1/pools/{}", encode(&pool)))?;
            context.output.print(&pool, show)
        }
        Pool::Health { pool } => {
            let pools: Vec<PoolInfo> = match pool {
                Some(pool) => vec![client.get(&format!("/v1/pools/{}", encode(&pool)))?],
                None => client.get("/v1/pools")?,
            };
            context.output.print(&pools, |pools| list(pools))?;
            let broken: Vec<_> = pools.iter().filter(|pool| !pool.ok).map(|pool| pool.name.as_str()).collect();
            if broken.is_empty() { Ok(()) } else { Err(anyhow::anyhow!("not working: {}", broken.join(", "))) }
        }
        Pool::Forget { pool } => {
            let done: Done = client.post(&format!("/v1/pools/{}/forget", encode(&pool)), &json!({}))?;
            context.output.print(&done, |_| {
                format!(
                    "pool {pool} forgotten: what is found in its place is taken; `novastor pool show {pool}` tells what that is"
                )
            })
        }
        Pool::Check { pool } => {
            let report: CheckReport = long::post(context, "pool check", &format!("/v1/pools/{}/check", encode(&pool)))?;
            context.output.print(&report, report_text)?;
            if report.ok { Ok(()) } else { Err(anyhow::anyhow!("pool {pool}: {} problems", report.problems.len())) }
        }
    }
}

fn size(bytes: Option<u64>) -> String {
    bytes.map(format_size).unwrap_or_default()
}

fn list(pools: &[PoolInfo]) -> String {
    let row = |pool: &PoolInfo| {
        let state = if pool.ok { "ok" } else { "not working" };
        let (total, free) = (size(pool.total), size(pool.free));
        [pool.name.clone(), pool.driver.clone(), pool.location.clone(), state.to_owned(), total, free, pool.detail.clone()]
    };
    table(["POOL", "DRIVER", "WHERE", "STATE", "SIZE", "FREE", "DETAIL"], pools.iter().map(row))
}

fn show(pool: &PoolInfo) -> String {
    facts([
        ("pool", pool.name.clone()),
        ("driver", pool.driver.clone()),
        ("where", pool.location.clone()),
        ("state", if pool.ok { "ok".to_owned() } else { "not working".to_owned() }),
        ("detail", pool.detail.clone()),
        ("size", size(pool.total)),
        ("free", size(pool.free)),
    ])
}
