//! Lists of options such as `serial=disk0,queues=8,ro`.

use super::{Error, parse_size};

/// One parsed list. Every key is taken at most once; [`Options::finish`] refuses what nobody took.
#[derive(Debug)]
pub struct Options {
    flag: &'static str,
    text: String,
    entries: Vec<(String, Option<String>)>,
}

impl Options {
    /// Splits `text`, which was given for `flag`.
    ///
    /// # Errors
    /// An empty or repeated key.
    pub fn parse(flag: &'static str, text: &str) -> Result<Self, Error> {
        let mut options = Self { flag, text: text.to_owned(), entries: Vec::new() };
        for part in text.split(',') {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key, Some(value.to_owned())),
                None => (part, None),
            };
            if key.is_empty() {
                return Err(options.error("an option has no name"));
            }
            if options.entries.iter().any(|(other, _)| other == key) {
                return Err(options.error(format!("{key} is given twice")));
            }
            options.entries.push((key.to_owned(), value));
        }
        Ok(options)
    }

    /// Takes the value of `key`.
    ///
    /// # Errors
    /// The key is there without a value, or with an empty one.
    pub fn text(&mut self, key: &str) -> Result<Option<String>, Error> {
        let Some(index) = self.entries.iter().position(|(other, _)| other == key) else { return Ok(None) };
        match self.entries.remove(index).1 {
            Some(value) if !value.is_empty() => Ok(Some(value)),
            _ => Err(self.error(format!("{key} needs a value: {key}=…"))),
        }
    }

    /// Takes the number that `key` has.
    ///
    /// # Errors
    /// As [`Options::text`], or it is not a number of `T`.
    pub fn number<T: std::str::FromStr>(&mut self, key: &str) -> Result<Option<T>, Error> {
        let Some(value) = self.text(key)? else { return Ok(None) };
        value.parse().map(Some).map_err(|_| self.error(format!("{key}={value} is not a number in range")))
    }

    /// Takes the size in bytes that `key` has.
    ///
    /// # Errors
    /// As [`Options::text`], or it is not a size.
    pub fn size(&mut self, key: &str) -> Result<Option<u64>, Error> {
        let Some(value) = self.text(key)? else { return Ok(None) };
        parse_size(&value).map(Some).map_err(|error| self.error(format!("{key}: {error}")))
    }

    /// Takes `key`, which has no value.
    ///
    /// # Errors
    /// It has one.
    pub fn flag(&mut self, key: &str) -> Result<bool, Error> {
        let Some(index) = self.entries.iter().position(|(other, _)| other == key) else { return Ok(false) };
        match self.entries.remove(index).1 {
            None => Ok(true),
            Some(value) => Err(self.error(format!("{key} takes no value, but has {value:?}"))),
        }
    }

    /// Refuses what is left.
    ///
    /// # Errors
    /// Names the first unknown key and those that are known.
    pub fn finish(self, known: &str) -> Result<(), Error> {
        match self.entries.first() {
            None => Ok(()),
            Some((key, _)) => Err(self.error(format!("{key:?} is unknown here; known are {known}"))),
        }
    }

    /// An error about this list.
    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::Options { option: self.flag, text: self.text.clone(), reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_each_kind_once() {
        let mut options = Options::parse("--x", "a=1,b=2M,c,d=e=f").unwrap();
        assert_eq!(options.number::<u16>("a"), Ok(Some(1)));
        assert_eq!(options.number::<u16>("a"), Ok(None));
        assert_eq!(options.size("b"), Ok(Some(2 << 20)));
        assert_eq!(options.flag("c"), Ok(true));
        assert_eq!(options.text("d"), Ok(Some("e=f".into())));
        options.finish("a, b, c and d").unwrap();
    }

    #[test]
    fn mistakes_are_named() {
        let message = |text: &str, ask: fn(&mut Options) -> Result<(), Error>| {
            Options::parse("--x", text)
                .and_then(|mut options| ask(&mut options).and_then(|()| options.finish("a")))
                .unwrap_err()
                .to_string()
        };
        assert_eq!(message("a,a", |_| Ok(())), r#"--x "a,a": a is given twice"#);
        assert_eq!(message("a=1,,", |_| Ok(())), r#"--x "a=1,,": an option has no name"#);
        assert_eq!(message("b", |_| Ok(())), r#"--x "b": "b" is unknown here; known are a"#);
        assert!(message("a", |o| o.text("a").map(drop)).ends_with("a needs a value: a=…"));
        assert!(message("a=", |o| o.text("a").map(drop)).ends_with("a needs a value: a=…"));
        assert!(message("a=70000", |o| o.number::<u16>("a").map(drop)).ends_with("is not a number in range"));
        assert!(message("a=1", |o| o.flag("a").map(drop)).ends_with(r#"a takes no value, but has "1""#));
    }
}
