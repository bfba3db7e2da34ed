//! The attributes of a field, parsed, and checked against each other and against the fields before.

use proc_macro2::Span;
use syn::ext::IdentExt;
use syn::spanned::Spanned;
use syn::{Attribute, Error, Expr, ExprLit, Ident, Lit, LitInt, LitStr, Path, Result, Type};

use crate::attributes::{Header, argument, each, once, quoted};
use crate::field::{Counts, Field, Kind, Length, Which};

/// The attributes on a field, as they stand there.
#[derive(Default)]
pub struct Options {
    length: LengthOptions,
    each: LengthOptions,
    list: Option<Span>,
    min: Option<Expr>,
    since: Option<LitInt>,
    until: Option<LitInt>,
    default: Option<Expr>,
    versions: Option<syn::ExprArray>,
    subsection: Option<Span>,
    needed: Option<Path>,
    recursive: Option<Span>,
    equal: Option<Path>,
    check: Option<Path>,
}

/// `len`, `len_from` and `max`, or the same with `each_`.
#[derive(Default)]
struct LengthOptions {
    len: Option<Expr>,
    from: Option<Path>,
    max: Option<Expr>,
}

impl Options {
    pub fn parse(attributes: &[Attribute]) -> Result<Self> {
        let mut options = Options::default();
        each(attributes, |meta| {
            let Some(key) = meta.path.get_ident() else {
                return Err(meta.error("expected the name of an option"));
            };
            match key.to_string().as_str() {
                "len" => once(&meta, &mut options.length.len, |meta| meta.value()?.parse()),
                "len_from" => once(&meta, &mut options.length.from, quoted),
                "max" => once(&meta, &mut options.length.max, |meta| meta.value()?.parse()),
                "each_len" => once(&meta, &mut options.each.len, |meta| meta.value()?.parse()),
                "each_len_from" => once(&meta, &mut options.each.from, quoted),
                "each_max" => once(&meta, &mut options.each.max, |meta| meta.value()?.parse()),
                "list" => once(&meta, &mut options.list, |meta| Ok(meta.path.span())),
                "min" => once(&meta, &mut options.min, |meta| meta.value()?.parse()),
                "since" => once(&meta, &mut options.since, |meta| meta.value()?.parse()),
                "until" => once(&meta, &mut options.until, |meta| meta.value()?.parse()),
                "default" => once(&meta, &mut options.default, quoted),
                "versions" => once(&meta, &mut options.versions, |meta| meta.value()?.parse()),
                "subsection" => once(&meta, &mut options.subsection, |meta| Ok(meta.path.span())),
                "needed" => once(&meta, &mut options.needed, quoted),
                "recursive" => once(&meta, &mut options.recursive, |meta| Ok(meta.path.span())),
                "equal" => once(&meta, &mut options.equal, quoted),
                "check" => once(&meta, &mut options.check, quoted),
                _ => Err(meta.error(
                    "a field has `len`, `len_from`, `max`, `each_len`, `each_len_from`, `each_max`, `list`, `min`, `since`, \
                     `until`, `default`, `versions`, `subsection`, `needed`, `recursive`, `equal` and `check`",
                )),
            }
        })?;
        Ok(options)
    }

    pub fn into_field(
        mut self,
        ident: Ident,
        ty: &Type,
        header: &Header,
        earlier: &mut [Field],
    ) -> Result<Field> {
        self.belong_together(header)?;
        let (since, until) = self.lifetime(header)?;
        let versions = self.nested_versions(since, until, header)?;

        let mut field = Field {
            ident,
            ty: ty.clone(),
            kind: Kind::Plain { max: None },
            min: self.min.take(),
            since,
            until,
            default: self.default.take(),
            versions,
            recursive: self.recursive.is_some(),
            equal: self.equal.take(),
            check: self.check.take(),
        };
        field.kind = self.into_kind(&field, earlier)?;
        Ok(field)
    }

    /// Refuses attributes that mean nothing together.
    fn belong_together(&self, header: &Header) -> Result<()> {
        let refuse = |span, message: &str| Err(Error::new(span, message));
        let length = self.length.len.as_ref().map(Spanned::span);
        let layouts = [length, self.length.from.as_ref().map(Spanned::span), self.list, self.subsection];
        let mut layouts = layouts.into_iter().flatten();
        let (layout, second) = (layouts.next(), layouts.next());
        if let Some(second) = second {
            return refuse(second, "a field is one of `len`, `len_from`, `list` and `subsection`");
        }
        if let Some(from) = &self.each.from
            && self.each.len.is_some()
        {
            return refuse(from.span(), "a length is either `each_len` or `each_len_from`");
        }
        if let (Some(each), false) = (self.each.span(), self.length.is_somewhere()) {
            return refuse(
                each,
                "`each_...` is for a `Vec` of collections, whose own length is `len` or `len_from`",
            );
        }
        if let (Some(max), false) = (&self.each.max, self.each.is_somewhere()) {
            return refuse(max.span(), "`each_max` belongs to an `each_len` or `each_len_from`");
        }
        if let (Some(needed), None) = (&self.needed, self.subsection) {
            return refuse(needed.span(), "`needed` belongs to a `subsection`");
        }
        if let (Some(min), Some(_)) = (&self.min, layout) {
            return refuse(min.span(), "`min` is for integers");
        }
        let asks = [&self.length.from, &self.each.from, &self.equal];
        if let (Some(path), None) = (asks.into_iter().flatten().next(), &header.context) {
            return refuse(
                path.span(),
                "name the type that is asked: `#[vmstate(context = \"...\")]` on the struct",
            );
        }
        if let Some(span) = self.recursive {
            if layout.is_none() || self.subsection.is_some() {
                return refuse(span, "`recursive` is for a list or a collection with a length");
            }
            if header.depth.is_none() {
                return refuse(
                    span,
                    "say how deep the struct may lie inside itself: `#[vmstate(depth = N)]` on the struct",
                );
            }
        }
        let absent_by_itself = self.since.is_none()
            && self.until.is_none()
            && self.default.is_none()
            && self.versions.is_none()
            && self.length.max.is_none()
            && self.equal.is_none();
        if let (Some(span), false) = (self.subsection, absent_by_itself) {
            return refuse(span, "a subsection has its own version and is absent where it was not written");
        }
        Ok(())
    }

    fn into_kind(self, field: &Field, earlier: &mut [Field]) -> Result<Kind> {
        let ty = &field.ty;
        if self.length.is_somewhere() && self.each.is_somewhere() {
            let row = argument(ty, "Vec").ok_or_else(|| {
                Error::new(
                    ty.span(),
                    "only the collections of a `Vec` have an `each_len`; those of an array have a `len`",
                )
            })?;
            let length = self.length.find(field, Which::Rows, earlier)?;
            let each = Box::new(self.each.find(field, Which::Each, earlier)?);
            return Ok(Kind::Rows { row, length, each });
        }
        if self.length.is_somewhere() {
            return Ok(Kind::Counted { length: self.length.find(field, Which::Only, earlier)? });
        }
        if let Some(span) = self.list {
            let max = self.length.max;
            let max =
                max.ok_or_else(|| Error::new(span, "a list needs `max`: its end comes from outside"))?;
            let item = argument(ty, "Vec").ok_or_else(|| Error::new(ty.span(), "a list is a `Vec`"))?;
            return Ok(Kind::List { item, max });
        }
        if self.subsection.is_some() {
            let part = argument(ty, "Option");
            let part = part.ok_or_else(|| Error::new(ty.span(), "a subsection is an `Option`"))?;
            return Ok(Kind::Subsection { part, needed: self.needed });
        }
        Ok(Kind::Plain { max: self.length.max })
    }

    /// `since` and `until`, which must lie within the versions that are read.
    fn lifetime(&self, header: &Header) -> Result<(Option<u32>, Option<u32>)> {
        let number = |literal: &Option<LitInt>| literal.as_ref().map(LitInt::base10_parse::<u32>).transpose();
        let (since, until) = (number(&self.since)?, number(&self.until)?);
        let Header { oldest, version, .. } = header;
        if let Some(since) = since.filter(|since| since > version) {
            return Err(Error::new(
                self.since.span(),
                format!("`since` is {since} but `version` is {version}"),
            ));
        }
        if let Some(since) = since.filter(|since| since <= oldest) {
            return Err(Error::new(
                self.since.span(),
                format!("every version that is read ({oldest} on) has the field since {since}"),
            ));
        }
        if let Some(until) = until.filter(|until| until < oldest || until >= version) {
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

impl LengthOptions {
    fn is_somewhere(&self) -> bool {
        self.len.is_some() || self.from.is_some()
    }

    fn span(&self) -> Option<Span> {
        let from = self.from.as_ref().map(Spanned::span);
        self.len.as_ref().map(Spanned::span).or(from).or(self.max.as_ref().map(Spanned::span))
    }

    /// The length of `collection`; if an earlier field holds it, that field is marked.
    fn find(self, collection: &Field, which: Which, earlier: &mut [Field]) -> Result<Length> {
        let maximum = |max: Option<Expr>, span| {
            let name = if matches!(which, Which::Each) { "each_max" } else { "max" };
            let missing = format!("a counted field needs `{name}`: the count comes from outside");
            max.ok_or_else(|| Error::new(span, missing))
        };
        match (self.len, self.from) {
            (Some(Expr::Lit(ExprLit { lit: Lit::Str(name), .. })), _) => {
                let max = maximum(self.max, name.span())?;
                Ok(Length::Field { count: count_field(&name, collection, which, earlier)?, max })
            }
            (Some(constant), _) => match self.max {
                Some(max) => Err(Error::new(max.span(), "a length that is a constant needs no maximum")),
                None => Ok(Length::Constant(constant)),
            },
            (None, Some(of)) => Ok(Length::Context { max: maximum(self.max, of.span())?, of }),
            (None, None) => unreachable!("the caller has seen a length"),
        }
    }
}

/// Finds the field that holds a length of `collection` and marks it so.
fn count_field(name: &LitStr, collection: &Field, which: Which, earlier: &mut [Field]) -> Result<Ident> {
    let text = name.value();
    let refuse = |why: &str| Err(Error::new(name.span(), format!("`{text}` cannot be a length: {why}")));
    let Some(at) = earlier.iter().position(|field| field.ident.unraw() == text) else {
        let message = format!("there is no field `{text}` before `{}`", collection.ident);
        return Err(Error::new(name.span(), message));
    };
    let field = &earlier[at];
    let integer = matches!(&field.ty, Type::Path(path) if ["u8", "u16", "u32"].iter().any(|name| path.path.is_ident(name)));
    if !integer {
        return refuse("it must be a u8, u16 or u32");
    }
    if field.since.is_some() || field.until.is_some() {
        return refuse("not every version has it");
    }
    let lifetime = |field: &Field| (field.since, field.until);
    if let Kind::Count { of, .. } = &field.kind
        && let Some(first) = earlier.iter().find(|field| of.iter().any(|counts| counts.field == field.ident))
        && lifetime(first) != lifetime(collection)
    {
        return refuse(&format!("it is that of `{}`, which is in other versions", first.ident));
    }
    let counts = Counts { field: collection.ident.clone(), which };
    let field = &mut earlier[at];
    match &mut field.kind {
        Kind::Plain { max } => field.kind = Kind::Count { max: max.take(), of: vec![counts] },
        Kind::Count { of, .. } => of.push(counts),
        _ => return refuse("it is a collection itself"),
    }
    Ok(field.ident.clone())
}
