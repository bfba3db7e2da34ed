//! Writes the implementation from the checked attributes.

use proc_macro2::{Literal, TokenStream};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Ident, Path};

use crate::attributes::{Description, Field, Kind, Length};

pub fn expand(description: &Description) -> TokenStream {
    let Description { ident, name, version, oldest, context, check, fields } = description;
    let (parts, plain): (Vec<_>, Vec<_>) =
        fields.iter().partition(|field| matches!(field.kind, Kind::Subsection { .. }));
    let present: Vec<_> = plain.iter().copied().filter(|field| field.until.is_none()).collect();

    let depths = fields.iter().map(|field| field.constant("DEPTH"));
    let save = present.iter().map(|field| field.save());
    let save_parts = parts.iter().map(|field| field.on_part("save", quote!(out)));
    let describe = present.iter().map(|field| field.describe());
    let describe_parts = parts.iter().map(|field| field.on_part("describe", quote!(description)));
    let schemas = plain.iter().map(|field| field.schema());
    let part_schemas = parts.iter().map(|field| {
        let part = field.part();
        quote!(<#part as ::vmstate::VmState>::schema())
    });
    let asserts = fields.iter().map(|field| field.asserts(*oldest, *version));
    let load = plain.iter().map(|field| field.load(*oldest, *version));
    let load_parts = load_parts(&parts);
    let members = fields.iter().map(|field| {
        let (member, local) = (&field.ident, field.local());
        quote!(#member: #local)
    });
    let context = context.as_ref().map(
        |context| quote!(let context = reader.context::<#context>(<Self as ::vmstate::VmState>::NAME)?;),
    );
    let check = check.as_ref().map(|check| checked(check, quote!(&state)));

    quote! {
        const _: () = {
            #[allow(dead_code)]
            const PARENT: &str = #name;
            #(#asserts)*
        };

        #[automatically_derived]
        impl ::vmstate::VmState for #ident {
            const NAME: &'static str = #name;
            const VERSION: u32 = #version;
            const OLDEST: u32 = #oldest;
            const DEPTH: u32 = ::vmstate::derived::depth(&[#(#depths),*]);

            fn save_fields(&self, out: &mut ::std::vec::Vec<u8>) {
                #(#save)*
                #(#save_parts)*
            }

            fn load_fields(reader: &mut ::vmstate::Reader<'_>, version: u32) -> ::std::result::Result<Self, ::vmstate::Error> {
                let _ = version;
                #context
                #(#load)*
                #load_parts
                let state = #ident { #(#members),* };
                #check
                ::std::result::Result::Ok(state)
            }

            fn describe_fields(&self, description: &mut ::vmstate::Description) {
                #(#describe)*
                #(#describe_parts)*
            }

            fn schema() -> ::vmstate::Schema {
                ::vmstate::Schema {
                    name: #name,
                    version: #version,
                    oldest: #oldest,
                    fields: ::std::vec![#(#schemas),*],
                    subsections: ::std::vec![#(#part_schemas),*],
                }
            }
        }

        const _: () = ::std::assert!(
            <#ident as ::vmstate::VmState>::DEPTH <= ::vmstate::derived::MAX_DEPTH,
            "the structs are nested too deeply"
        );
    }
}

/// Reads subsections as long as one with our prefix follows.
fn load_parts(parts: &[&Field]) -> TokenStream {
    let next = quote!(::vmstate::derived::subsection::next(reader, <Self as ::vmstate::VmState>::NAME)?);
    let unknown = quote!(return ::std::result::Result::Err(::vmstate::derived::subsection::unknown(name)););
    if parts.is_empty() {
        return quote!(if let ::std::option::Option::Some(name) = #next { #unknown });
    }
    let locals: Vec<_> = parts.iter().map(|field| field.local()).collect();
    let types: Vec<_> = parts.iter().map(|field| field.part()).collect();
    let names: Vec<_> = parts.iter().map(|field| field.ident.to_string()).collect();
    let checks = parts.iter().filter_map(|field| {
        let local = field.local();
        Some(in_field(field, &checked_value(field.check.as_ref()?, quote!(&#local))))
    });
    quote! {
        #(let mut #locals: ::std::option::Option<#types> = ::std::option::Option::None;)*
        while let ::std::option::Option::Some(name) = #next {
            #(if name == <#types as ::vmstate::VmState>::NAME.as_bytes() {
                ::vmstate::derived::subsection::load::<#types>(reader, &mut #locals).map_err(|error| error.in_field(#names))?;
                continue;
            })*
            #unknown
        }
        #(#checks;)*
    }
}

impl Field {
    /// The variable that holds the field while a struct is loaded.
    fn local(&self) -> Ident {
        format_ident!("field_{}", self.ident)
    }

    fn name(&self) -> String {
        self.ident.to_string()
    }

    /// The type of a subsection.
    fn part(&self) -> &syn::Type {
        match &self.kind {
            Kind::Subsection { part, .. } => part,
            _ => &self.ty,
        }
    }

    /// The type and the trait that lay the field out, as `<T as Trait>`.
    fn layout(&self) -> TokenStream {
        let ty = &self.ty;
        match &self.kind {
            Kind::Plain { .. } | Kind::Count { .. } => quote_spanned!(ty.span()=> <#ty as ::vmstate::Value>),
            Kind::Counted { .. } => quote_spanned!(ty.span()=> <#ty as ::vmstate::Counted>),
            Kind::List { item, .. } => quote_spanned!(item.span()=> <#item as ::vmstate::Value>),
            Kind::Subsection { part, .. } => quote_spanned!(part.span()=> <#part as ::vmstate::VmState>),
        }
    }

    fn constant(&self, name: &str) -> TokenStream {
        let (layout, name) = (self.layout(), format_ident!("{name}"));
        quote!(#layout::#name)
    }

    fn save(&self) -> TokenStream {
        let (ident, ty, layout) = (&self.ident, &self.ty, self.layout());
        match &self.kind {
            Kind::Plain { .. } => quote!(#layout::save(&self.#ident, out);),
            // What is written is the real length, so that a length and its collection cannot disagree in a stream.
            Kind::Count { of, .. } => {
                let (first, others) = of.split_first().expect("a count counts something");
                quote! {
                    #(::std::debug_assert_eq!(
                        ::vmstate::Counted::count(&self.#first),
                        ::vmstate::Counted::count(&self.#others),
                        "collections that share a length"
                    );)*
                    #layout::save(&(::vmstate::Counted::count(&self.#first) as #ty), out);
                }
            }
            Kind::Counted { max, .. } => quote! {
                ::std::debug_assert!(::vmstate::Counted::count(&self.#ident) <= (#max) as usize, "more elements than `max`");
                #layout::save(&self.#ident, out);
            },
            Kind::List { item, .. } => quote!(::vmstate::derived::list::save::<#item>(&self.#ident, out);),
            Kind::Subsection { .. } => TokenStream::new(),
        }
    }

    fn on_part(&self, function: &str, target: TokenStream) -> TokenStream {
        let (ident, part, function) = (&self.ident, self.part(), format_ident!("{function}"));
        let needed = match &self.kind {
            Kind::Subsection { needed: Some(needed), .. } => quote!(#needed(self)),
            _ => quote!(true),
        };
        quote!(::vmstate::derived::subsection::#function::<#part>(self.#ident.as_ref(), #needed, #target);)
    }

    fn describe(&self) -> TokenStream {
        let (ident, name) = (&self.ident, self.name());
        match &self.kind {
            Kind::List { item, .. } => {
                quote!(::vmstate::derived::list::describe::<#item>(&self.#ident, #name, description);)
            }
            _ => {
                let layout = self.layout();
                quote!(#layout::describe(&self.#ident, #name, description);)
            }
        }
    }

    fn load(&self, oldest: u32, version: u32) -> TokenStream {
        let (local, ty, layout) = (self.local(), &self.ty, self.layout());
        let nested = self.nested_version(oldest, version);
        let value = match &self.kind {
            Kind::Plain { .. } | Kind::Count { .. } => {
                in_field(self, &quote!(#layout::load(reader, #nested)))
            }
            Kind::Counted { length, max } => {
                let (count, holder) = match length {
                    Length::Field(field) => {
                        let local = format_ident!("field_{field}");
                        (quote!(::vmstate::derived::bounded(#local, (#max) as usize)), field.to_string())
                    }
                    Length::Context(path) => {
                        let count = quote_spanned!(path.span()=> #path(context));
                        (quote!(::vmstate::derived::bounded_here(#count, (#max) as usize)), self.name())
                    }
                };
                let load = in_field(self, &quote!(#layout::load(reader, count, #nested)));
                quote! {{
                    let count = #count.map_err(|error| error.in_field(#holder))?;
                    #load
                }}
            }
            Kind::List { item, max } => in_field(
                self,
                &quote!(::vmstate::derived::list::load::<#item>(reader, (#max) as usize, #nested)),
            ),
            Kind::Subsection { .. } => return TokenStream::new(),
        };
        let checks = self.checks();
        let value = quote! {{
            let value: #ty = #value;
            #checks
            value
        }};
        match self.guard() {
            None => quote!(let #local: #ty = #value;),
            Some(guard) => {
                let default = self
                    .default
                    .as_ref()
                    .map_or_else(|| quote!(::std::default::Default::default()), |e| quote!(#e));
                quote!(let #local: #ty = if #guard { #value } else { #default };)
            }
        }
    }

    /// The condition on `version` under which the field is in the stream.
    fn guard(&self) -> Option<TokenStream> {
        match (self.since, self.until) {
            (None, None) => None,
            (Some(since), None) => Some(quote!(version >= #since)),
            (None, Some(until)) => Some(quote!(version <= #until)),
            (Some(since), Some(until)) => Some(quote!((#since..=#until).contains(&version))),
        }
    }

    fn checks(&self) -> TokenStream {
        let max = match &self.kind {
            Kind::Plain { max } | Kind::Count { max, .. } => max.as_ref(),
            _ => None,
        };
        let max = max.map(|max| in_field(self, &quote!(::vmstate::derived::at_most(value, #max))));
        let min =
            self.min.as_ref().map(|min| in_field(self, &quote!(::vmstate::derived::at_least(value, #min))));
        let equal = self.equal.as_ref().map(|equal| {
            let ours = quote_spanned!(equal.span()=> #equal(context));
            in_field(self, &quote!(::vmstate::derived::same(&value, #ours)))
        });
        let check = self.check.as_ref().map(|check| in_field(self, &checked_value(check, quote!(&value))));
        let statements = [max, min, equal, check].into_iter().flatten();
        quote!(#(#statements;)*)
    }

    /// The version of the struct inside, as an expression of ours.
    fn nested_version(&self, oldest: u32, version: u32) -> TokenStream {
        let newest = self.constant("STRUCT_VERSION");
        if self.versions.is_empty() {
            return newest;
        }
        let (first, _) = self.span_of_versions(oldest, version);
        let ours = (first..).map(Literal::u32_unsuffixed);
        let theirs = &self.versions;
        let arms = ours.zip(theirs).map(|(ours, theirs)| quote!(#ours => #theirs));
        quote!(match version { #(#arms,)* _ => #newest })
    }

    /// What only the types of the fields can tell.
    fn asserts(&self, oldest: u32, version: u32) -> TokenStream {
        let ty = &self.ty;
        if let Kind::Subsection { part, .. } = &self.kind {
            return quote_spanned! {part.span()=>
                ::std::assert!(
                    ::vmstate::derived::subsection::is_part_of(<#part as ::vmstate::VmState>::NAME, PARENT),
                    "a subsection's name is the name of its parent, a slash, and its own"
                );
            };
        }
        let (first, last) = self.span_of_versions(oldest, version);
        let (struct_oldest, struct_version) =
            (self.constant("STRUCT_OLDEST"), self.constant("STRUCT_VERSION"));
        let versions = &self.versions;
        if !versions.is_empty() {
            quote_spanned! {ty.span()=>
                ::std::assert!(
                    ::vmstate::derived::versions_fit(&[#(#versions),*], #struct_oldest, #struct_version),
                    "`versions` must be versions that the struct inside reads, and end with its newest"
                );
            }
        } else if first != last {
            quote_spanned! {ty.span()=>
                ::std::assert!(
                    #struct_oldest == #struct_version,
                    "the struct inside has several versions: say with `versions` which of them each version of this one holds"
                );
            }
        } else {
            TokenStream::new()
        }
    }

    fn schema(&self) -> TokenStream {
        let (name, versions, ty) = (self.name(), &self.versions, &self.ty);
        let fill = match &self.kind {
            Kind::List { item, .. } => quote!(::vmstate::derived::list::schema::<#item>(&mut field)),
            _ => {
                let layout = self.layout();
                quote!(#layout::schema(&mut field))
            }
        };
        let max = match &self.kind {
            Kind::Plain { max } | Kind::Count { max, .. } => {
                max.as_ref().map(|max| quote!({ let max: #ty = #max; max as i128 }))
            }
            Kind::Counted { max, .. } | Kind::List { max, .. } => Some(quote!((#max) as usize as i128)),
            Kind::Subsection { .. } => None,
        };
        let max = option(max);
        let min = option(self.min.as_ref().map(|min| quote!({ let min: #ty = #min; min as i128 })));
        let count = option(match &self.kind {
            Kind::Counted { length: Length::Field(count), .. } => Some(count.to_string()),
            _ => None,
        });
        let count_from_context = matches!(self.kind, Kind::Counted { length: Length::Context(_), .. });
        let equal = self.equal.is_some();
        let (since, until) = (option(self.since), option(self.until));
        quote! {{
            let mut field = ::vmstate::FieldSchema {
                name: #name,
                count: #count,
                count_from_context: #count_from_context,
                equal: #equal,
                max: #max,
                min: #min,
                since: #since,
                until: #until,
                struct_versions: &[#(#versions),*],
                ..::std::default::Default::default()
            };
            #fill;
            field
        }}
    }
}

fn option(value: Option<impl ToTokens>) -> TokenStream {
    match value {
        Some(value) => quote!(::std::option::Option::Some(#value)),
        None => quote!(::std::option::Option::None),
    }
}

/// `result?`, with the field's name put in front of the error's path.
fn in_field(field: &Field, result: &TokenStream) -> TokenStream {
    let name = field.name();
    quote!(#result.map_err(|error| error.in_field(#name))?)
}

fn checked_value(check: &Path, value: TokenStream) -> TokenStream {
    quote!(::vmstate::derived::checked(#check(#value)))
}

fn checked(check: &Path, value: TokenStream) -> TokenStream {
    let result = checked_value(check, value);
    quote!(#result?;)
}
