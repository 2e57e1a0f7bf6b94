//! Temporary.
use std::sync::Arc;
use whimbrel::migrate::*;
use whimbrel_page_server::transport::*;
use whimbrel_page_server::identity::Identity;
struct Show;
impl destination::Observer for Show { fn note(&self, t:&str){ eprintln!("[serve] {t}"); } }
impl source::Observer for Show {
 fn phase(&self, p: Phase){ eprintln!("[migrate] {p}"); }
 fn round(&self, n:u32, r:&report::Round){ eprintln!("[migrate] round {n}: {r:?}"); }
 fn cancelled(&self)->bool{false}
}
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let rt = Runtime::new(2).unwrap();
    let cred = Credentials::Pinned{ identity: Identity::load_or_create(std::path::Path::new(&std::env::var("WID").unwrap())).unwrap(), trust: Trust::List(Default::default()) };
    if a[1]=="serve" {
        let ep = rt.block_on(async { Endpoint::bind(a[2].parse().unwrap(), &cred, Options::default()) }).unwrap();
        let o = destination::Options{ root: "/".into(), runtime: rt.handle().clone() };
        rt.block_on(server::serve(&ep, &o, Arc::new(Show)));
    } else {
        let ep = rt.block_on(async { Endpoint::bind("0.0.0.0:0".parse().unwrap(), &cred, Options::default()) }).unwrap();
        let mode = match a[4].as_str() {"pre"=>Mode::PreCopy,"post"=>Mode::PostCopy,_=>Mode::Hybrid};
        let o = source::Options{ pid: a[2].parse().unwrap(), destination: a[3].parse().unwrap(),
          limits: policy::Limits{mode, max_downtime: std::time::Duration::from_millis(100), max_rounds: 10, strict:false},
          dump: whimbrel::dump::Options{ shell_job:true, tcp_established:true, ..Default::default()}, move_address: a.get(5).cloned().unwrap_or_default(), move_device: String::new(), dry_run:false,
          journal: journal::Journal::open(std::path::Path::new("/run/whimbrel")).unwrap(), hooks: Default::default()};
        match source::run(&rt,&ep,&o,&Show) { Ok(source::Outcome::Moved(r))=>eprintln!("{}", r.summary()), Ok(x)=>eprintln!("{x:?}"), Err(e)=>{eprintln!("Error: {}", e.chain()); std::process::exit(1)} }
    }
}
