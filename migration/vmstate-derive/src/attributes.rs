//! The attributes of a struct, parsed and checked. Those of its fields are parsed in `options` and checked in `field`.

use proc_macro2::Span;
use syn::meta::ParseNestedMeta;
use syn::spanned::Spanned;
use syn::{Attribute, Data, DeriveInput, Error, Fields, Ident, LitInt, LitStr, Path, Result, Type};

use crate::field::{Field, Length};
use crate::options::Options;

/// What a struct says of itself.
pub struct Description {
    pub ident: Ident,
    pub header: Header,
    pub fields: Vec<Field>,
}

/// The attributes on the struct.
pub struct Header {
    pub name: LitStr,
    pub version: u32,
    pub oldest: u32,
    /// Levels of the struct inside itself, if it is recursive.
    pub depth: Option<(u32, Span)>,
    /// The type of the context that fields are held against.
    pub context: Option<Type>,
    pub check: Option<Path>,
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
            let field = Options::parse(&field.attrs)?.into_field(ident, &field.ty, &header, &mut fields)?;
            fields.push(field);
        }
        header.is_used_by(&fields)?;
        Ok(Description { ident: input.ident.clone(), header, fields })
    }
}

impl Header {
    fn parse(input: &DeriveInput) -> Result<Self> {
        let (mut name, mut version, mut oldest) = (None, None, None);
        let (mut depth, mut context, mut check) = (None, None, None);
        each(&input.attrs, |meta| {
            let Some(key) = meta.path.get_ident() else {
                return Err(meta.error("expected the name of an option"));
            };
            match key.to_string().as_str() {
                "name" => once(&meta, &mut name, |meta| meta.value()?.parse::<LitStr>()),
                "version" => once(&meta, &mut version, |meta| meta.value()?.parse::<LitInt>()),
                "oldest" => once(&meta, &mut oldest, |meta| meta.value()?.parse::<LitInt>()),
                "depth" => once(&meta, &mut depth, |meta| meta.value()?.parse::<LitInt>()),
                "context" => once(&meta, &mut context, quoted),
                "check" => once(&meta, &mut check, quoted),
                _ => {
                    Err(meta
                        .error("a struct has `name`, `version`, `oldest`, `depth`, `context` and `check`"))
                }
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
        let depth = depth.map(|depth| Ok::<_, Error>((depth.base10_parse()?, depth.span()))).transpose()?;
        if let Some((0, span)) = depth {
            return Err(Error::new(span, "the struct itself is the first level, so `depth` is 1 at least"));
        }
        Ok(Header { name, version: newest, oldest: first, depth, context, check })
    }

    /// What is said of the struct must mean something for its fields.
    fn is_used_by(&self, fields: &[Field]) -> Result<()> {
        let asks = |field: &Field| {
            field.equal.is_some() || field.lengths().any(|length| matches!(length, Length::Context { .. }))
        };
        if let Some(context) = self.context.as_ref().filter(|_| !fields.iter().any(asks)) {
            return Err(Error::new(
                context.span(),
                "no field asks the context: none has `equal`, `len_from` or `each_len_from`",
            ));
        }
        if let Some((_, span)) = self.depth.filter(|_| !fields.iter().any(|field| field.recursive)) {
            return Err(Error::new(
                span,
                "`depth` is for a struct that contains itself: mark the field that leads back with `recursive`",
            ));
        }
        Ok(())
    }
}

/// `T` of `Wrapper<T>`.
pub fn argument(ty: &Type, wrapper: &str) -> Option<Type> {
    let Type::Path(path) = ty else { return None };
    let last = path.path.segments.last().filter(|segment| segment.ident == wrapper)?;
    let syn::PathArguments::AngleBracketed(arguments) = &last.arguments else { return None };
    match arguments.args.first()? {
        syn::GenericArgument::Type(inner) if arguments.args.len() == 1 => Some(inner.clone()),
        _ => None,
    }
}

pub fn each(attributes: &[Attribute], mut option: impl FnMut(ParseNestedMeta) -> Result<()>) -> Result<()> {
    attributes
        .iter()
        .filter(|attribute| attribute.path().is_ident("vmstate"))
        .try_for_each(|a| a.parse_nested_meta(&mut option))
}

pub fn once<T>(
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
pub fn quoted<T: syn::parse::Parse>(meta: &ParseNestedMeta) -> Result<T> {
    meta.value()?.parse::<LitStr>()?.parse()
}
