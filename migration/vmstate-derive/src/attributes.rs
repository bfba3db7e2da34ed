//! The attributes of a struct and of its fields, parsed and checked.

use proc_macro2::Span;
use syn::meta::ParseNestedMeta;
use syn::spanned::Spanned;
use syn::{Attribute, Data, DeriveInput, Error, Expr, Fields, Ident, LitInt, LitStr, Path, Result, Type};

/// What a struct says of itself.
pub struct Description {
    pub ident: Ident,
    pub name: LitStr,
    pub version: u32,
    pub oldest: u32,
    /// The type of the context that fields are held against.
    pub context: Option<Type>,
    pub check: Option<Path>,
    pub fields: Vec<Field>,
}

/// One field.
pub struct Field {
    pub ident: Ident,
    pub ty: Type,
    pub kind: Kind,
    pub min: Option<Expr>,
    pub since: Option<u32>,
    pub until: Option<u32>,
    pub default: Option<Expr>,
    /// The versions of the struct inside, one for each version of ours that has the field.
    pub versions: Vec<u32>,
    /// What the context says the value must be.
    pub equal: Option<Path>,
    pub check: Option<Path>,
}

/// How a field is laid out.
pub enum Kind {
    /// On its own.
    Plain { max: Option<Expr> },
    /// On its own, and it holds the length of later fields.
    Count { max: Option<Expr>, of: Vec<Ident> },
    /// With the length outside.
    Counted { length: Length, max: Expr },
    /// With its own end.
    List { item: Type, max: Expr },
    /// An optional part after the fields.
    Subsection { part: Type, needed: Option<Path> },
}

/// Where the length of a counted field is.
pub enum Length {
    /// In an earlier field.
    Field(Ident),
    /// With the context: the stream does not hold it.
    Context(Path),
}

impl Field {
    /// The first and the last version that has the field.
    pub fn span_of_versions(&self, oldest: u32, version: u32) -> (u32, u32) {
        (self.since.unwrap_or(0).max(oldest), self.until.unwrap_or(u32::MAX).min(version))
    }

    fn asks_context(&self) -> bool {
        self.equal.is_some() || matches!(self.kind, Kind::Counted { length: Length::Context(_), .. })
    }
}

impl Description {
    pub fn parse(input: &DeriveInput) -> Result<Self> {
        let Data::Struct(data) = &input.data else {
            return Err(Error::new(
                input.ident.span(),
                "only structs have a saved state; save an enum as an integer",
            ));
        };
        let Fields::Named(named) = &data.fields else {
            return Err(Error::new(
                input.ident.span(),
                "a saved state needs named fields: their names go into the description",
            ));
        };
        if !input.generics.params.is_empty() {
            return Err(Error::new(
                input.generics.span(),
                "a saved state has one layout, so it cannot be generic",
            ));
        }

        let header = Header::parse(input)?;
        let mut fields = Vec::new();
        for field in &named.named {
            let ident = field.ident.clone().expect("named fields have names");
            let options = Options::parse(&field.attrs)?;
            let field = options.into_field(ident, &field.ty, &header, &mut fields)?;
            fields.push(field);
        }
        let Header { name, version, oldest, context, check } = header;
        if let Some(context) = context.as_ref().filter(|_| !fields.iter().any(Field::asks_context)) {
            return Err(Error::new(
                context.span(),
                "no field asks the context: neither `equal` nor `len_from` is used",
            ));
        }
        Ok(Description { ident: input.ident.clone(), name, version, oldest, context, check, fields })
    }
}

/// The attributes on the struct.
struct Header {
    name: LitStr,
    version: u32,
    oldest: u32,
    context: Option<Type>,
    check: Option<Path>,
}

impl Header {
    fn parse(input: &DeriveInput) -> Result<Self> {
        let (mut name, mut version, mut oldest, mut context, mut check) = (None, None, None, None, None);
        each(&input.attrs, |meta| {
            if meta.path.is_ident("name") {
                once(&meta, &mut name, |meta| meta.value()?.parse::<LitStr>())
            } else if meta.path.is_ident("version") {
                once(&meta, &mut version, |meta| meta.value()?.parse::<LitInt>())
            } else if meta.path.is_ident("oldest") {
                once(&meta, &mut oldest, |meta| meta.value()?.parse::<LitInt>())
            } else if meta.path.is_ident("context") {
                once(&meta, &mut context, quoted)
            } else if meta.path.is_ident("check") {
                once(&meta, &mut check, quoted)
            } else {
                Err(meta.error("a struct has `name`, `version`, `oldest`, `context` and `check`"))
            }
        })?;

        let name = name.ok_or_else(|| {
            Error::new(input.ident.span(), "give the description a name: `#[vmstate(name = \"...\")]`")
        })?;
        let text = name.value();
        if text.is_empty() || text.len() > 127 || text.contains('\0') {
            return Err(Error::new(name.span(), "a name has 1 to 127 bytes and no NUL"));
        }
        let newest = version.as_ref().map_or(Ok(1), LitInt::base10_parse)?;
        let first = oldest.as_ref().map_or(Ok(newest), LitInt::base10_parse)?;
        if first > newest {
            return Err(Error::new(oldest.span(), format!("`oldest` is {first} but `version` is {newest}")));
        }
        Ok(Header { name, version: newest, oldest: first, context, check })
    }
}

/// The attributes on a field, not yet checked against each other.
#[derive(Default)]
struct Options {
    len: Option<LitStr>,
    len_from: Option<Path>,
    list: Option<Span>,
    max: Option<Expr>,
    min: Option<Expr>,
    since: Option<LitInt>,
    until: Option<LitInt>,
    default: Option<Expr>,
    versions: Option<syn::ExprArray>,
    subsection: Option<Span>,
    needed: Option<Path>,
    equal: Option<Path>,
    check: Option<Path>,
}

impl Options {
    fn parse(attributes: &[Attribute]) -> Result<Self> {
        let mut options = Options::default();
        each(attributes, |meta| {
            let Some(key) = meta.path.get_ident() else {
                return Err(meta.error("expected the name of an option"));
            };
            match key.to_string().as_str() {
                "len" => once(&meta, &mut options.len, |meta| meta.value()?.parse()),
                "len_from" => once(&meta, &mut options.len_from, quoted),
                "list" => once(&meta, &mut options.list, |meta| Ok(meta.path.span())),
                "max" => once(&meta, &mut options.max, |meta| meta.value()?.parse()),
                "min" => once(&meta, &mut options.min, |meta| meta.value()?.parse()),
                "since" => once(&meta, &mut options.since, |meta| meta.value()?.parse()),
                "until" => once(&meta, &mut options.until, |meta| meta.value()?.parse()),
                "default" => once(&meta, &mut options.default, quoted),
                "versions" => once(&meta, &mut options.versions, |meta| meta.value()?.parse()),
                "subsection" => once(&meta, &mut options.subsection, |meta| Ok(meta.path.span())),
                "needed" => once(&meta, &mut options.needed, quoted),
                "equal" => once(&meta, &mut options.equal, quoted),
                "check" => once(&meta, &mut options.check, quoted),
                _ => Err(meta.error(
                    "a field has `len`, `len_from`, `list`, `max`, `min`, `since`, `until`, `default`, `versions`, `subsection`, \
                     `needed`, `equal` and `check`",
                )),
            }
        })?;
        Ok(options)
    }

    fn into_field(self, ident: Ident, ty: &Type, header: &Header, earlier: &mut [Field]) -> Result<Field> {
        let layouts = [
            self.len.as_ref().map(LitStr::span),
            self.len_from.as_ref().map(Path::span),
            self.list,
            self.subsection,
        ];
        if let Some(second) = layouts.into_iter().flatten().nth(1) {
            return Err(Error::new(second, "a field is one of `len`, `len_from`, `list` and `subsection`"));
        }
        if let (Some(path), None) = (self.len_from.as_ref().or(self.equal.as_ref()), &header.context) {
            return Err(Error::new(
                path.span(),
                "name the type that is asked: `#[vmstate(context = \"...\")]` on the struct",
            ));
        }
        if let (Some(needed), None) = (&self.needed, self.subsection) {
            return Err(Error::new(needed.span(), "`needed` belongs to a `subsection`"));
        }
        if let (Some(min), true) = (&self.min, layouts.into_iter().flatten().next().is_some()) {
            return Err(Error::new(min.span(), "`min` is for integers"));
        }
        let (since, until) = self.lifetime(header)?;
        let versions = self.nested_versions(since, until, header)?;

        let kind = if let Some(count) = &self.len {
            let max = self.max.ok_or_else(|| {
                Error::new(count.span(), "a counted field needs `max`: the count comes from outside")
            })?;
            Kind::Counted { length: Length::Field(count_field(count, &ident, earlier)?), max }
        } else if let Some(count) = self.len_from {
            let max = self.max.ok_or_else(|| {
                Error::new(count.span(), "a counted field needs `max`, wherever its count comes from")
            })?;
            Kind::Counted { length: Length::Context(count), max }
        } else if let Some(span) = self.list {
            let max =
                self.max.ok_or_else(|| Error::new(span, "a list needs `max`: its end comes from outside"))?;
            let item = argument(ty, "Vec").ok_or_else(|| Error::new(ty.span(), "a list is a `Vec`"))?;
            Kind::List { item, max }
        } else if let Some(span) = self.subsection {
            let part =
                argument(ty, "Option").ok_or_else(|| Error::new(ty.span(), "a subsection is an `Option`"))?;
            if since.is_some()
                || until.is_some()
                || self.default.is_some()
                || self.versions.is_some()
                || self.max.is_some()
                || self.equal.is_some()
            {
                return Err(Error::new(
                    span,
                    "a subsection has its own version and is absent where it was not written",
                ));
            }
            Kind::Subsection { part, needed: self.needed }
        } else {
            Kind::Plain { max: self.max }
        };
        Ok(Field {
            ident,
            ty: ty.clone(),
            kind,
            min: self.min,
            since,
            until,
            default: self.default,
            versions,
            equal: self.equal,
            check: self.check,
        })
    }

    /// `since` and `until`, which must lie within the versions that are read.
    fn lifetime(&self, header: &Header) -> Result<(Option<u32>, Option<u32>)> {
        let number = |literal: &Option<LitInt>| literal.as_ref().map(LitInt::base10_parse::<u32>).transpose();
        let (since, until) = (number(&self.since)?, number(&self.until)?);
        if let Some(since) = since.filter(|since| *since > header.version) {
            return Err(Error::new(
                self.since.span(),
                format!("`since` is {since} but `version` is {}", header.version),
            ));
        }
        if let Some(since) = since.filter(|since| *since <= header.oldest) {
            let oldest = header.oldest;
            return Err(Error::new(
                self.since.span(),
                format!("every version that is read ({oldest} on) has the field since {since}"),
            ));
        }
        if let Some(until) = until.filter(|until| *until < header.oldest || *until >= header.version) {
            let (oldest, version) = (header.oldest, header.version);
            return Err(Error::new(
                self.until.span(),
                format!(
                    "`until` is {until}: it must be at least `oldest` ({oldest}) and below `version` ({version})"
                ),
            ));
        }
        if let (Some(since), Some(until)) = (since, until)
            && since > until
        {
            return Err(Error::new(self.until.span(), format!("`until` is {until} but `since` is {since}")));
        }
        if let (Some(default), None, None) = (&self.default, since, until) {
            return Err(Error::new(default.span(), "`default` is for fields with `since` or `until`"));
        }
        Ok((since, until))
    }

    fn nested_versions(&self, since: Option<u32>, until: Option<u32>, header: &Header) -> Result<Vec<u32>> {
        let Some(array) = &self.versions else { return Ok(Vec::new()) };
        let first = since.unwrap_or(header.oldest);
        let last = until.unwrap_or(header.version);
        if array.elems.len() as u64 != u64::from(last) - u64::from(first) + 1 {
            return Err(Error::new(array.span(), format!("give one version for each of {first} to {last}")));
        }
        array
            .elems
            .iter()
            .map(|element| syn::parse2::<LitInt>(quote::quote!(#element))?.base10_parse())
            .collect()
    }
}

/// Finds the field that holds the length of `collection` and marks it so.
fn count_field(name: &LitStr, collection: &Ident, earlier: &mut [Field]) -> Result<Ident> {
    let text = name.value();
    let Some(field) = earlier.iter_mut().find(|field| field.ident == text) else {
        return Err(Error::new(name.span(), format!("there is no field `{text}` before `{collection}`")));
    };
    let integer = matches!(&field.ty, Type::Path(path) if ["u8", "u16", "u32"].iter().any(|name| path.path.is_ident(name)));
    if !integer {
        return Err(Error::new(
            name.span(),
            format!("`{text}` cannot be a length: it must be a u8, u16 or u32"),
        ));
    }
    if field.since.is_some() || field.until.is_some() {
        return Err(Error::new(
            name.span(),
            format!("`{text}` cannot be a length: not every version has it"),
        ));
    }
    match &mut field.kind {
        Kind::Plain { max } => field.kind = Kind::Count { max: max.take(), of: vec![collection.clone()] },
        Kind::Count { of, .. } => of.push(collection.clone()),
        _ => return Err(Error::new(name.span(), format!("`{text}` cannot be a length"))),
    }
    Ok(field.ident.clone())
}

/// `T` of `Wrapper<T>`.
fn argument(ty: &Type, wrapper: &str) -> Option<Type> {
    let Type::Path(path) = ty else { return None };
    let last = path.path.segments.last().filter(|segment| segment.ident == wrapper)?;
    let syn::PathArguments::AngleBracketed(arguments) = &last.arguments else { return None };
    match arguments.args.first()? {
        syn::GenericArgument::Type(inner) if arguments.args.len() == 1 => Some(inner.clone()),
        _ => None,
    }
}

fn each(attributes: &[Attribute], mut option: impl FnMut(ParseNestedMeta) -> Result<()>) -> Result<()> {
    attributes
        .iter()
        .filter(|attribute| attribute.path().is_ident("vmstate"))
        .try_for_each(|a| a.parse_nested_meta(&mut option))
}

fn once<T>(
    meta: &ParseNestedMeta,
    place: &mut Option<T>,
    parse: impl FnOnce(&ParseNestedMeta) -> Result<T>,
) -> Result<()> {
    if place.is_some() {
        return Err(meta.error("given twice"));
    }
    *place = Some(parse(meta)?);
    Ok(())
}

/// A path or an expression inside a string, as in serde's attributes.
fn quoted<T: syn::parse::Parse>(meta: &ParseNestedMeta) -> Result<T> {
    meta.value()?.parse::<LitStr>()?.parse()
}
