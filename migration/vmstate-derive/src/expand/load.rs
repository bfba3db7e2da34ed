//! Loading: every value is read, bounded and checked, and errors get the names of the fields on their way out.

use proc_macro2::{Literal, TokenStream};
use quote::{quote, quote_spanned};
use syn::Path;
use syn::ext::IdentExt;
use syn::spanned::Spanned;

use super::local;
use crate::attributes::{Description, Header};
use crate::field::{Field, Kind, Length};

impl Description {
    pub fn load(&self) -> TokenStream {
        let Description { ident, header: Header { oldest, version, depth, context, check, .. }, fields } =
            self;
        let (plain, parts) = self.parts();
        let context = context.as_ref().map(|context| quote!(let context = reader.context::<#context>()?;));
        let (enter, leave) = depth
            .map(|(depth, _)| {
                let enter = quote!(::vmstate::derived::enter::<Self>(reader, #depth)?;);
                (enter, quote!(::vmstate::derived::leave(reader);))
            })
            .unzip();
        let load = plain.iter().map(|field| field.load(*oldest, *version));
        let load_parts = load_parts(&parts);
        let members = fields.iter().map(|field| {
            let (member, local) = (&field.ident, field.local());
            quote!(#member: #local)
        });
        let check = check.as_ref().map(|check| {
            let checked = checked(check, quote!(&state));
            quote!(#checked?;)
        });
        quote! {
            fn load_fields(reader: &mut ::vmstate::Reader<'_>, version: u32) -> ::std::result::Result<Self, ::vmstate::Error> {
                let _ = version;
                #context
                #enter
                #(#load)*
                #load_parts
                #leave
                let state = #ident { #(#members),* };
                #check
                ::std::result::Result::Ok(state)
            }
        }
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
    let names: Vec<_> = parts.iter().map(|field| field.name()).collect();
    let checks = parts.iter().filter_map(|field| {
        let local = field.local();
        Some(in_field(field, &checked(field.check.as_ref()?, quote!(&#local))))
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
    fn load(&self, oldest: u32, version: u32) -> TokenStream {
        let (local, ty, layout) = (self.local(), &self.ty, self.layout());
        let nested = self.nested_version(oldest, version);
        let value = match &self.kind {
            Kind::Plain { .. } | Kind::Count { .. } => {
                in_field(self, &quote!(#layout::load(reader, #nested)))
            }
            Kind::Counted { length } => {
                let count = length.found(self);
                let load = in_field(self, &quote!(#layout::load(reader, count, #nested)));
                quote!({ let count = #count; #load })
            }
            Kind::Rows { row, length, each } => {
                let (count, each) = (length.found(self), each.found(self));
                let load = quote!(::vmstate::derived::rows::load::<#row>(reader, count, each, #nested));
                let load = in_field(self, &load);
                quote!({ let (count, each) = (#count, #each); #load })
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
                let default = self.default.as_ref().map_or_else(
                    || quote_spanned!(ty.span()=> ::std::default::Default::default()),
                    |e| quote!(#e),
                );
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
        // A bound of what has none is a mistake of the field's type.
        let ty = self.ty.span();
        let max = self.max().map(|max| quote_spanned!(ty=> ::vmstate::derived::at_most(value, #max)));
        let max = max.map(|bound| in_field(self, &bound));
        let min = self.min.as_ref().map(|min| quote_spanned!(ty=> ::vmstate::derived::at_least(value, #min)));
        let min = min.map(|bound| in_field(self, &bound));
        let equal = self.equal.as_ref().map(|equal| {
            let ours = quote_spanned!(equal.span()=> #equal(context));
            in_field(self, &quote!(::vmstate::derived::same(&value, #ours)))
        });
        let check = self.check.as_ref().map(|check| in_field(self, &checked(check, quote!(&value))));
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
}

impl Length {
    /// The length of `field`, compared with its maximum.
    fn found(&self, field: &Field) -> TokenStream {
        match self {
            Length::Field { count, max } => {
                let (local, name) = (local(count), count.unraw().to_string());
                let bounded = quote!(::vmstate::derived::bounded(#local, (#max) as usize));
                quote!(#bounded.map_err(|error| error.in_field(#name))?)
            }
            Length::Context { of, max } => {
                let count = quote_spanned!(of.span()=> #of(context));
                in_field(field, &quote!(::vmstate::derived::bounded_here(#count, (#max) as usize)))
            }
            Length::Constant(constant) => quote!(#constant),
        }
    }
}

/// `result?`, with the field's name put in front of the error's path. Not by `map_err`, which would copy the value once more.
fn in_field(field: &Field, result: &TokenStream) -> TokenStream {
    let name = field.name();
    quote! {
        match #result {
            ::std::result::Result::Ok(value) => value,
            ::std::result::Result::Err(error) => return ::std::result::Result::Err(error.in_field(#name)),
        }
    }
}

fn checked(check: &Path, value: TokenStream) -> TokenStream {
    quote!(::vmstate::derived::checked(#check(#value)))
}
