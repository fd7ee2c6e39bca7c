//! A seeded simulator of a whole cluster around the core: model workers whose tokens depend on every KV page, clients
//! that know which tokens they must get, a network with delays, and faults drawn from the seed. The core is audited
//! after every event. Everything about a run follows from its seed.

mod alarm;
mod clients;
mod crashes;
mod deadlines;
mod group;
mod model;
mod random;
mod scenario;
mod scripted;
mod seeds;
mod worker;
mod world;
