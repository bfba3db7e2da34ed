//! The words of QMP: requests and answers as JSON, with QEMU's checks in QEMU's words. No I/O.

use serde_json::{Map, Value, json};

use super::operations::Refusal;

/// Most bytes of a request. An answer may repeat it, and a queue of answers waits for each client.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;

/// An answer that says no: QEMU's `error` member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{description}")]
pub struct QmpError {
    /// `GenericError` or `CommandNotFound`.
    pub class: &'static str,
    /// The sentence for people.
    pub description: String,
}

impl QmpError {
    /// The error class for nearly everything.
    pub fn generic(description: impl Into<String>) -> Self {
        Self { class: "GenericError", description: description.into() }
    }

    /// The error class for a command that does not exist, now or at all.
    pub fn command_not_found(description: impl Into<String>) -> Self {
        Self { class: "CommandNotFound", description: description.into() }
    }
}

impl From<Refusal> for QmpError {
    fn from(refusal: Refusal) -> Self {
        Self::generic(refusal.0)
    }
}

/// The first line that a client reads.
pub fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": [] } })
}

/// What QEMU calls `VersionInfo`: this program's own numbers.
pub fn version() -> Value {
    let number = |text: &str| text.parse::<u32>().unwrap_or(0);
    json!({
        "qemu": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("ferry-", env!("CARGO_PKG_VERSION")),
    })
}

/// A request that has the right shape.
#[derive(Debug, PartialEq)]
pub struct Request {
    /// The command's name.
    pub command: String,
    /// What it is called with.
    pub arguments: Arguments,
}

/// A text as a request, and the `id` to send back, which a malformed request may have too.
pub fn parse(text: &[u8]) -> (Option<Value>, Result<Request, QmpError>) {
    let members = match serde_json::from_slice(text) {
        Ok(Value::Object(members)) => members,
        Ok(_) => return (None, Err(QmpError::generic("QMP input must be a JSON object"))),
        Err(error) => return (None, Err(QmpError::generic(format!("JSON parse error, {error}")))),
    };
    (members.get("id").cloned(), request(members))
}

fn request(members: Map<String, Value>) -> Result<Request, QmpError> {
    let mut command = None;
    let mut arguments = Map::new();
    for (name, value) in members {
        match (name.as_str(), value) {
            ("id", _) => {}
            ("execute", Value::String(name)) => command = Some(name),
            ("execute", _) => return Err(QmpError::generic("QMP input member 'execute' must be a string")),
            ("arguments", Value::Object(members)) => arguments = members,
            ("arguments", _) => {
                return Err(QmpError::generic("QMP input member 'arguments' must be an object"));
            }
            (name, _) => return Err(QmpError::generic(format!("QMP input member '{name}' is unexpected"))),
        }
    }
    match command {
        Some(command) => Ok(Request { command, arguments: Arguments(arguments) }),
        None => Err(QmpError::generic("QMP input lacks member 'execute'")),
    }
}

/// An answer, as the line to write.
pub fn answer(id: Option<Value>, result: Result<Value, QmpError>) -> String {
    let mut message = match result {
        Ok(value) => json!({ "return": value }),
        Err(error) => json!({ "error": { "class": error.class, "desc": error.description } }),
    };
    if let Some(id) = id {
        message["id"] = id;
    }
    message.to_string()
}

/// The arguments of a command, taken one by one; [`Arguments::finish`] refuses what nobody took.
#[derive(Debug, Default, PartialEq)]
pub struct Arguments(Map<String, Value>);

impl Arguments {
    /// A string that must be there.
    pub fn string(&mut self, name: &str) -> Result<String, QmpError> {
        match self.0.remove(name) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(wrong_type(name, "string")),
            None => Err(missing(name)),
        }
    }

    /// A string that may be there.
    pub fn optional_string(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        if self.0.contains_key(name) { self.string(name).map(Some) } else { Ok(None) }
    }

    /// A flag that may be there.
    pub fn optional_bool(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(wrong_type(name, "boolean")),
        }
    }

    /// A flag that must be there.
    pub fn bool(&mut self, name: &str) -> Result<bool, QmpError> {
        self.optional_bool(name)?.ok_or_else(|| missing(name))
    }

    /// A whole number from 0 that may be there.
    pub fn optional_u64(&mut self, name: &str) -> Result<Option<u64>, QmpError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_u64() {
                Some(number) => Ok(Some(number)),
                None if number.is_i64() => {
                    Err(QmpError::generic(format!("Parameter '{name}' expects uint64")))
                }
                None => Err(wrong_type(name, "integer")),
            },
            Some(_) => Err(wrong_type(name, "integer")),
        }
    }

    /// A whole number from 0 that must be there.
    pub fn u64(&mut self, name: &str) -> Result<u64, QmpError> {
        self.optional_u64(name)?.ok_or_else(|| missing(name))
    }

    /// A list that may be there.
    pub fn optional_list(&mut self, name: &str) -> Result<Vec<Value>, QmpError> {
        match self.0.remove(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => Ok(values),
            Some(_) => Err(wrong_type(name, "array")),
        }
    }

    /// A list of strings that may be there.
    pub fn optional_strings(&mut self, name: &str) -> Result<Vec<String>, QmpError> {
        let string = |value| match value {
            Value::String(text) => Ok(text),
            _ => Err(wrong_type(name, "string")),
        };
        self.optional_list(name)?.into_iter().map(string).collect()
    }

    /// A list of objects that must be there.
    pub fn objects(&mut self, name: &str) -> Result<Vec<Arguments>, QmpError> {
        if !self.0.contains_key(name) {
            return Err(missing(name));
        }
        let object = |value| match value {
            Value::Object(members) => Ok(Arguments(members)),
            _ => Err(wrong_type(name, "object")),
        };
        self.optional_list(name)?.into_iter().map(object).collect()
    }

    /// Refuses arguments that are left over.
    pub fn finish(self) -> Result<(), QmpError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(QmpError::generic(format!("Parameter '{name}' is unexpected"))),
        }
    }
}

fn missing(name: &str) -> QmpError {
    QmpError::generic(format!("Parameter '{name}' is missing"))
}

fn wrong_type(name: &str, expected: &str) -> QmpError {
    QmpError::generic(format!("Invalid parameter type for '{name}', expected: {expected}"))
}
